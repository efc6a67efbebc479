"""Channel permutation: inputs are regrouped so that an N:M pattern keeps more of what matters.

Shapes: O outputs, I inputs, G groups of M inputs.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.registry import rewrite
from pumice.core.stats import Stats
from pumice.prune.layer import Selector
from pumice.prune.score.ria import ria
from pumice.weights.patterns.nm import NOfM
from pumice.weights.wrapped import PermutedLinear

CHUNK = 1 << 24
"""Numbers held at a time while columns are compared with groups."""


@rewrite("permute", paper="Zhang et al., ICLR 2024 (Plug-and-Play)", needs=("input_sqnorm",), patterns=("nm",))
def permute(
    module: nn.Linear,
    w_OI: Tensor,
    stats: Stats,
    select: Selector,
    *,
    power: Annotated[float, "power of the input norm in the RIA score"] = 0.5,
    sweeps: Annotated[int, "times that every place in the groups is assigned anew"] = 1,
) -> nn.Module:
    """N:M pruning by RIA after the inputs are dealt to groups so that more of the score is kept (channel permutation).

    First the columns are sorted by their summed score and dealt out so that each group gets one of every rank; then
    for each of the M places in turn its columns are assigned to the groups anew, by the linear assignment that keeps
    the most score. Neither sweep nor order keeps less than the natural order, which stays where it is the best.

    The order becomes a gather in front of the layer (`PermutedLinear`) and is not folded into the layers before it.
    Folding is free but exact only where those are linear up to elementwise functions and nobody else reads them (of a
    Llama block only the input of `down_proj`); a gather works for every layer. It costs a read and a write of the
    layer's input per row, beside a matrix product that reads O/2 times as much.

    Raises:
        PumiceError: no N:M pattern, or fewer than 0 sweeps.
    """
    pattern = select.pattern
    if not isinstance(pattern, NOfM):
        raise PumiceError(f"pattern={pattern.text!r}: permute regroups the inputs of N:M patterns, such as 2:4.")
    if sweeps < 0:
        raise PumiceError(f"sweeps={sweeps} must not be negative.")
    scores = ria(w_OI, stats, power=power)
    order = best_order(scores, pattern, sweeps)
    moved = w_OI[:, order]
    mask = select.whole(scores[:, order])
    core = nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False, device=w_OI.device, dtype=module.weight.dtype)
    core.weight = nn.Parameter((moved * mask).to(module.weight.dtype), requires_grad=False)
    return PermutedLinear(order, core, module.bias).train(module.training)


def retained(scores_OI: Tensor, pattern: NOfM) -> float:
    """The score that the pattern keeps."""
    return float((scores_OI * pattern.select(scores_OI, pattern.density(None))).sum(dtype=torch.float64))


def best_order(scores_OI: Tensor, pattern: NOfM, sweeps: int) -> Tensor:
    """The order of inputs that keeps the most score of those tried: natural, dealt out, and assigned."""
    order = _dealt(scores_OI, pattern.m)
    for _ in range(sweeps if pattern.m > 1 else 0):
        for place in range(pattern.m):
            order = _assigned(scores_OI, order, place, pattern)
    natural = torch.arange(scores_OI.shape[1], device=scores_OI.device)
    return max((natural, order), key=lambda found: retained(scores_OI[:, found], pattern))


def _dealt(scores_OI: Tensor, m: int) -> Tensor:
    """Columns by rank, there and back again over the groups."""
    ranked = scores_OI.sum(0).argsort(descending=True, stable=True).view(m, -1)
    for place in range(1, m, 2):
        ranked[place] = ranked[place].flip(0)
    return ranked.t().flatten()


def _assigned(scores_OI: Tensor, order_I: Tensor, place: int, pattern: NOfM) -> Tensor:
    """The order with the columns at one place of the groups assigned so that the most score is kept."""
    from scipy.optimize import linear_sum_assignment

    groups = order_I.view(-1, pattern.m)
    others = scores_OI[:, groups[:, [p for p in range(pattern.m) if p != place]]]
    columns = scores_OI[:, groups[:, place]]
    # A group keeps a newcomer for the least of the n that it would keep without it; with n = M there is room anyway.
    full = others.shape[-1] >= pattern.n
    least_OG = others.sort(-1, descending=True).values[..., pattern.n - 1] if full else torch.zeros_like(columns)
    gain_GG = torch.zeros(len(groups), len(groups), dtype=torch.float64)
    step = max(1, CHUNK // max(1, scores_OI.shape[0] * len(groups)))
    for start in range(0, len(groups), step):
        part = (columns[:, start : start + step, None] - least_OG[:, None]).clamp(min=0)
        gain_GG[start : start + step] = part.sum(0, dtype=torch.float64).cpu()
    column, group = linear_sum_assignment(gain_GG.numpy(), maximize=True)
    new = groups.clone()
    new[torch.from_numpy(group), place] = groups[torch.from_numpy(column), place]
    return new.flatten()
