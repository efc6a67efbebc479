"""Optimal Brain Surgeon column by column: SparseGPT.

Shapes: O outputs, I inputs, B columns of one block. Weights are held transposed, [I, O], so that the columns that the
inner loop walks over are contiguous.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from pumice.core.linalg import damped_inverse
from pumice.core.registry import recovery
from pumice.core.stats import Stats
from pumice.prune.layer import Score, Selector


@recovery("obs", paper="arXiv:2301.00774", needs=("hessian",), selects="obs")
def obs(
    w_OI: Tensor,
    stats: Stats,
    score: Score | None,
    select: Selector,
    *,
    damp: Annotated[float, "share of the mean Hessian diagonal added to it"] = 0.01,
    block: Annotated[int, "columns solved together"] = 128,
) -> tuple[Tensor, Tensor]:
    """Prune columns from left to right; after each, the columns to its right make up for the error (SparseGPT).

    With its own score (`score=None`) the mask of a block of columns is chosen by w²/[U]ⱼⱼ² when the walk reaches it,
    U being the upper Cholesky factor of H⁻¹, so after the compensation of everything to the left; N:M groups are
    chosen when their first column is reached. Beside another score, that score sets the mask once, on the original
    weights, and this only compensates.

    Inputs that calibration never saw (zero diagonal) get weight zero, as their weights cannot matter.
    """
    weight = w_OI.t().clone()
    hessian = stats["hessian"]
    dead = torch.diagonal(hessian) <= 0
    weight[dead] = 0
    inverse, used = damped_inverse(hessian, damp)
    if used != damp:
        select.note(f"Hessian was not positive definite with damp {damp:g}; {used:g} was used")
    upper = torch.linalg.cholesky(inverse, upper=True)
    group = select.group_columns
    mask = None
    if score is not None or group is None:
        scores = score(w_OI) if score is not None else w_OI.square() / torch.diagonal(inverse)
        mask = select.whole(scores).t().contiguous()
    step = _columns_per_block(block, group)
    # N:M groups are chosen one by one, wider groups and single columns a block at a time, as in the paper.
    lazily = mask is None and select.pattern.decides_locally
    kept = torch.empty_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        part, factor = weight[start:stop], upper[start:stop, start:stop]
        diagonal = torch.diagonal(factor)
        if mask is not None:
            kept[start:stop] = mask[start:stop]
        elif not lazily:
            kept[start:stop] = select.whole((part / diagonal[:, None]).square().t()).t()
        errors = _solve_block(part, factor, kept[start:stop], select if lazily else None, group or 1)
        weight[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    return weight.t().contiguous(), kept.t().contiguous()


def _columns_per_block(block: int, group: int | None) -> int:
    group = group or 1
    return max(1, block // group) * group


def _solve_block(part_BO: Tensor, factor_BB: Tensor, kept_BO: Tensor, select: Selector | None, group: int) -> Tensor:
    """Prune and compensate inside one block, in place; returns the scaled errors [B, O] that later blocks absorb."""
    errors = torch.empty_like(part_BO)
    pivots = torch.diagonal(factor_BB).tolist()
    squares = torch.diagonal(factor_BB).square()[:, None]
    for column, pivot in enumerate(pivots):
        if select is not None and column % group == 0:
            scores = part_BO[column : column + group].square() / squares[column : column + group]
            kept_BO[column : column + group] = select.whole(scores.t()).t()
        w = part_BO[column]
        error = errors[column]
        torch.mul(w, ~kept_BO[column], out=error)
        error /= pivot
        w.mul_(kept_BO[column])
        if column + 1 < len(pivots):
            part_BO[column + 1 :].addr_(factor_BB[column, column + 1 :], error, alpha=-1)
    return errors
