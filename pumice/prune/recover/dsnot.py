"""DSnoT: swap weights in and out of a mask without any training."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from pumice.core.registry import recovery
from pumice.core.stats import Stats
from pumice.prune.layer import Score, Selector


@recovery(
    "dsnot",
    key="dsnot",
    paper="arXiv:2310.08915",
    needs=("input_mean", "input_var", "input_sqnorm"),
    patterns=("unstructured", "nm"),
)
def dsnot(
    w_OI: Tensor,
    stats: Stats,
    score: Score,
    select: Selector,
    *,
    cycles: Annotated[int, "most swaps per row"] = 50,
    threshold: Annotated[float, "stop when the expected error of a row, per token, is smaller than this"] = 0.1,
    power: Annotated[float, "power of the input variance that a regrown weight is divided by"] = 1.0,
) -> tuple[Tensor, Tensor]:
    """Per row, swap weights until the expected output error Σ W·E[x] over the pruned weights is nearly zero (DSnoT).

    Regrow the pruned weight whose W·E[x]/Var[x]^power most reduces the error; prune the kept weight of the lowest
    |W|·‖x‖ among those whose loss also reduces it (N:M: inside the same group). A row stops at the threshold, before
    its error would change sign, when it has no candidate, or after `cycles` swaps. No weight is swapped twice.

    Criteria, order and the numbers 50, 0.1 and 1 were checked against the authors' program. It differs in four things: its
    expected error adds up the tokens of a window (2048), so that its 0.1 is 5e-5 of the error per token here; without
    N:M it goes on when the error changes sign, and swaps back and forth until the cycles end; under N:M it takes the
    lowest |W|·‖x‖ of the group whether or not its loss helps; and it leaves out the MLP layers, which is a matter of
    `targets` here.
    """
    mask = select.whole(score(w_OI))
    expected = w_OI * stats["input_mean"]
    regrow_score = expected / stats["input_var"].clamp(min=1e-12).pow(power)
    prune_score = w_OI.abs() * stats["input_sqnorm"].sqrt()
    group = select.group_columns or 1
    can_grow, can_prune = ~mask, mask.clone()
    error = (expected * ~mask).sum(1)
    active = torch.nonzero(error.abs() > threshold).flatten()
    for _ in range(cycles):
        if not len(active):
            break
        sign = error[active].sign()
        gain = (regrow_score[active] * sign[:, None]).masked_fill(~can_grow[active], -torch.inf)
        grown_score, grown = gain.max(1)
        allowed = can_prune[active] & (expected[active] * sign[:, None] < 0)
        if group > 1:
            same = torch.arange(w_OI.shape[1], device=w_OI.device) // group == (grown // group)[:, None]
            allowed &= same
        lost_score, lost = prune_score[active].masked_fill(~allowed, torch.inf).min(1)
        after = error[active] - expected[active, grown] + expected[active, lost]
        swap = (grown_score > 0) & torch.isfinite(lost_score) & (after.sign() == sign)
        active, grown, lost = active[swap], grown[swap], lost[swap]
        mask[active, grown], mask[active, lost] = True, False
        can_grow[active, grown], can_prune[active, lost] = False, False
        error[active] = after[swap]
        active = active[error[active].abs() > threshold]
    return w_OI * mask, mask
