"""Spectrum-preserving sparsification: small weights cut, medium ones drawn by lot and scaled up, large ones kept."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from pumice.core import select as selection
from pumice.core.errors import PumiceError
from pumice.core.registry import recovery
from pumice.core.stats import Stats
from pumice.prune.layer import Given, Score, Selector


@recovery(
    "spectrum",
    key="spectrum-preserving-pruning",
    paper="arXiv:2307.08982",
    needs=("random",),
    selects="magnitude",
    patterns=("unstructured", "nm"),
)
def spectrum(
    w_OI: Tensor,
    stats: Stats,
    score: Score | None,
    select: Selector,
    *,
    medium: Annotated[float, "share of the kept weights that are drawn by lot; 0 is magnitude pruning"] = 0.1,
) -> tuple[Tensor, Tensor]:
    """Cut the small weights, keep the large ones, and draw the medium ones with p ∝ w², those drawn becoming w/p.

    Random zeros that leave the expected matrix as it is disturb its singular values less than a cut, which removes all
    small entries in the same direction. Of k kept weights the (1−medium)·k largest stay as they are, the next
    2·medium·k are the lot, the rest is cut. The lot is priority sampling: weight j gets the rank w²/u with u uniform,
    the best ranks win, and p = min(1, w²/z) with z the best rank that lost. So the density is exact, and E[w'] = w for
    every weight of the lot. With N:M each group draws for itself. Beside another score than magnitude that score sets
    the mask, without a lot.

    Doubt: only the paper's abstract could be checked, which promises a sparsification that preserves the spectrum and
    gives no formula. The rule here is that of the sparsification results in this line (keep with p growing with w², divide
    by p; Achlioptas and McSherry), from memory; thresholds and schedule of the paper are not known here. The paper trains
    between rounds. It looks at no inputs: in one shot, without that training, a score that does is the better choice.
    """
    if not 0 <= medium <= 1:
        raise PumiceError(f"medium={medium} is outside [0, 1].")
    if score is not None or isinstance(select, Given):
        # The groups of a convolution get a mask that was made over all of them, which cannot be drawn again.
        mask = select.whole(score(w_OI) if score is not None else w_OI.abs())
        return w_OI * mask, mask
    square = w_OI.square()
    sets = _competitors(square, select)
    keep = int(select.whole(square).view_as(sets)[0].sum())
    drawn = round(medium * keep)
    sure = selection.topk(sets, keep - drawn)
    lot = selection.topk(sets, keep + drawn) & ~sure
    noise = _competitors(1 - stats["random"].to(w_OI), select)
    priority = torch.where(lot, sets / noise, 0)
    mask = select.whole(torch.where(sure, torch.inf, priority).view_as(w_OI))
    loser = priority.masked_fill(mask.view_as(sets), 0).amax(-1, keepdim=True)
    # 1/p, computed so that a zero weight in the lot stays zero.
    scale = torch.where(lot & (sets < loser), loser / sets.clamp(min=1e-38), 1)
    return w_OI * mask * scale.view_as(w_OI), mask


def _competitors(x_OI: Tensor, select: Selector) -> Tensor:
    """The matrix as [sets, members], a set being what competes for a place: a group of N:M, a row, or the layer."""
    if select.pattern.decides_locally:
        return x_OI.reshape(-1, select.group_columns or x_OI.shape[1])
    return x_OI if select.pattern.scope == "row" else x_OI.reshape(1, -1)
