"""Optimal Brain Surgeon column by column: SparseGPT, and GPTQ in the same walk.

Shapes: O outputs, I inputs, B columns of one block. Weights are held transposed, [I, O], so that the columns that the
inner loop walks over are contiguous.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from pumice.core.linalg import inverse_factor
from pumice.core.registry import recovery
from pumice.core.stats import Stats
from pumice.prune.layer import Score, Selector
from pumice.prune.rounding import Rounder

RUN = 16


@recovery("obs", paper="arXiv:2301.00774", needs=("hessian",), selects="obs", rounds=True)
def obs(
    w_OI: Tensor,
    stats: Stats,
    score: Score | None,
    select: Selector,
    *,
    damp: Annotated[float, "share of the mean Hessian diagonal added to it"] = 0.01,
    block: Annotated[int, "columns solved together"] = 128,
    joint: Annotated[bool, "round inside the walk, its error made up for too, where values are integers"] = True,
) -> tuple[Tensor, Tensor]:
    """Prune columns from left to right; after each, the columns to its right make up for the error (SparseGPT).

    With its own score (`score=None`) the mask of a block of columns is chosen by w²/[U]ⱼⱼ² when the walk reaches it,
    U being the upper Cholesky factor of H⁻¹, so after the compensation of everything to the left; N:M groups are
    chosen when their first column is reached. Beside another score, that score sets the mask once, on the original
    weights, and this only compensates.

    Where the kept weights are to be integers they are rounded when the walk reaches them, and the columns to the right
    make up for pruning and rounding together (GPTQ, arXiv:2210.17323; together as SparseGPT's section 3.4 does it);
    `joint=False` leaves the rounding to afterwards.

    Inputs that calibration never saw (zero diagonal) get weight zero, as their weights cannot matter.
    """
    weight = w_OI.t().clone()
    hessian = stats["hessian"]
    dead = torch.diagonal(hessian) <= 0
    weight[dead] = 0
    upper, used = inverse_factor(hessian, damp)
    if used != damp:
        select.note(f"Hessian was not positive definite with damp {damp:g}; {used:g} was used")
    group = select.group_columns
    mask = None
    if score is not None or group is None:
        scores = score(w_OI) if score is not None else weight.t().square() / upper.square().sum(0)
        mask = select.whole(scores).t().contiguous()
    rounder = Rounder(select.coding) if select.coding is not None and joint else None
    if rounder is not None and rounder.coding.group == 0:
        rounder.begin(weight if mask is None else weight * mask, 1 / upper.square().sum(0))
    step = _columns_per_block(block, math.lcm(group or 1, rounder.coding.group or 1 if rounder else 1))
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
            before = float(kept[:start].sum()) / max(kept.shape[1], 1)
            kept[start:stop] = select.columns((part / diagonal[:, None]).square().t(), stop, before).t()
        errors = _solve_block(part, factor, kept[start:stop], select if lazily else None, group or 1, rounder)
        weight[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    if rounder is not None:
        select.grids.append(rounder.grid())
    return weight.t().contiguous(), kept.t().contiguous()


def _columns_per_block(block: int, group: int | None) -> int:
    group = group or 1
    return max(1, block // group) * group


def _solve_block(
    part_BO: Tensor,
    factor_BB: Tensor,
    kept_BO: Tensor,
    select: Selector | None,
    group: int,
    rounder: Rounder | None,
) -> Tensor:
    """Prune, round and compensate inside one block, in place; returns the scaled errors [B, O] that later blocks absorb.

    The block is worked off in short runs of columns: inside a run each column updates the rest of the run, and what
    the run leaves for the columns behind it is one matrix product.
    """
    errors = torch.empty_like(part_BO)
    diagonal = torch.diagonal(factor_BB)
    pivots, squares = diagonal.tolist(), diagonal.square()[:, None]
    run = max(1, RUN // group) * group if select is not None else RUN
    if rounder is not None:
        # A scale is fitted where everything to the left is made up for: at the beginning of a run.
        run = math.lcm(run, RUN)
    for start in range(0, len(pivots), run):
        stop = min(start + run, len(pivots))
        for column in range(start, stop):
            if select is not None and column % group == 0:
                own = slice(column, column + group)
                kept_BO[own] = select.whole((part_BO[own].square() / squares[own]).t()).t()
            w, error = part_BO[column], errors[column]
            if rounder is None:
                torch.mul(w, ~kept_BO[column], out=error)
                w -= error
            else:
                if rounder.begins(column):
                    own = slice(column, column + rounder.coding.group)
                    _begin(rounder, part_BO[own], squares[own], kept_BO[own] if select is None else select)
                new = rounder.round(w) * kept_BO[column] + 0.0
                torch.sub(w, new, out=error)
                w.copy_(new)
            error /= pivots[column]
            if column + 1 < stop:
                part_BO[column + 1 : stop].addr_(factor_BB[column, column + 1 : stop], error, alpha=-1)
        part_BO[stop:].addmm_(factor_BB[start:stop, stop:].t(), errors[start:stop], alpha=-1)
    return errors


def _begin(rounder: Rounder, part_CO: Tensor, squares_C1: Tensor, kept: Tensor | Selector) -> None:
    """Fit the scale of a group to the weights that stay in it, as far as that is known yet."""
    if isinstance(kept, Selector):
        kept = kept.whole((part_CO.square() / squares_C1).t()).t()
    rounder.begin(part_CO * kept, 1 / squares_C1.squeeze(1))
