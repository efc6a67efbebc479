"""ALPS: the mask by operator splitting, then the weights by conjugate gradients. Shapes: O outputs, I inputs."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from pumice.core.linalg import damped, refit
from pumice.core.registry import recovery
from pumice.core.stats import Stats
from pumice.prune.layer import Score, Selector

CHECK = 3
"""Iterations between two looks at how much of the mask still changes."""
LEAST = 30
SETTLED = 3e-4


@recovery("alps", simpler="obs", paper="arXiv:2406.07831", needs=("hessian",), selects="obs")
def alps(
    w_OI: Tensor,
    stats: Stats,
    score: Score | None,
    select: Selector,
    *,
    damp: Annotated[float, "share of the mean Hessian diagonal added to it"] = 0.01,
    rho: Annotated[float, "first weight of the mask in the splitting; it grows as the mask settles"] = 0.1,
    iterations: Annotated[int, "most iterations of the splitting"] = 300,
    refine: Annotated[int, "steps of conjugate gradients on the final mask"] = 20,
) -> tuple[Tensor, Tensor]:
    """Solve the layer's least-squares problem with the zeros as a constraint (ALPS): splitting, then an exact refit.

    min ‖X(W−W')ᵀ‖² over W' with a legal mask is split into a dense copy B and a masked copy D that are drawn together:
    B = argmin of the error + ρ/2‖B−D+V/ρ‖², D = the mask's projection of B+V/ρ, V += ρ(B−D). Inputs are scaled to unit
    norm first. ρ grows 1.3, 1.2 or 1.1 times (by how much of the mask changed in three iterations: over 10 %, over
    0.5 %, less) and the loop ends when it no longer changes. Beside another score that score sets the mask, and only the
    refit is done.
    """
    hessian = damped(stats["hessian"], damp)
    dead = torch.diagonal(stats["hessian"]) <= 0
    goal = w_OI.masked_fill(dead, 0)
    if score is not None:
        mask = select.whole(score(w_OI))
        start = goal * mask
    else:
        scale = torch.diagonal(hessian).sqrt()
        found, mask = _split(hessian / scale / scale[:, None], goal * scale, select, rho, iterations)
        start = goal if bool(mask.all()) else found * mask / scale
    return refit(hessian, goal, mask, start, steps=refine), mask


def _split(h_II: Tensor, goal_OI: Tensor, select: Selector, rho: float, iterations: int) -> tuple[Tensor, Tensor]:
    """The dense copy and the mask where the splitting settles."""
    values, vectors = torch.linalg.eigh(h_II)
    values = values.clamp(min=0)
    pull = goal_OI @ h_II

    def inverse() -> Tensor:
        return (vectors / (values + rho)) @ vectors.t()

    first = select.whole(goal_OI.square())
    restart, solver = True, inverse()
    b, mask, d, v = goal_OI, first, goal_OI * first, torch.zeros_like(goal_OI)
    seen = mask
    kept = max(int(mask.sum()), 1)
    for iteration in range(1, iterations + 1):
        b = (pull - v + rho * d) @ solver
        moved = b + v / rho
        mask = select.whole(moved.square())
        d = moved * mask
        v += rho * (b - d)
        if iteration % CHECK:
            continue
        changed = int((mask != seen).sum()) / kept
        seen = mask
        if changed > 0.005:
            restart = False
            rho *= 1.3 if changed > 0.1 else 1.2
        elif not restart:
            if changed == 0 or (iteration > LEAST and changed < SETTLED):
                break
            rho *= 1.1
        else:
            # ρ holds the mask so firmly that it never moved: begin again with less.
            rho /= 5
            b, mask, d, v = goal_OI, first, goal_OI * first, torch.zeros_like(goal_OI)
            seen = mask
            if rho < 1e-6:
                break
        solver = inverse()
    return b, mask
