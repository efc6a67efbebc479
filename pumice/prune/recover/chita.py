"""CHITA: pruning as a regression on the gradients with a limit on the number of weights; no Hessian is ever formed.

Shapes: O outputs, I inputs, N gradients. A matrix A of N rows and one column per weight lies in memory layer by layer
as gradients_ONI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from pumice.core.errors import PumiceError
from pumice.core.registry import recovery
from pumice.core.stats import Stats
from pumice.prune.layer import Score, Selector

Weights = list[Tensor]
Project = Callable[[Weights], Weights]
"""Scaled weights -> masks that keep the legal part of them with the largest sum of squares."""
STEPS = (16.0, 4.0, 1.0, 0.25, 0.0625)
"""What the line search tries, in units of the exact step of the weights that are not kept, were they all free."""


@recovery("chita", simpler="obs", key="chita", paper="arXiv:2302.14623", needs=("gradients",), selects="magnitude")
def chita(
    w_OI: Tensor,
    stats: Stats,
    score: Score | None,
    select: Selector,
    *,
    damp: Annotated[float, "λ as a share of the mean squared gradient of the layer"] = 0.001,
    diagonal: Annotated[float, "share of every weight's own squared gradient added to its λ"] = 3.0,
    first: Annotated[float, "share of the first-order term; 0 takes the model to stand at a minimum"] = 0.0,
    iterations: Annotated[int, "most steps of hard thresholding"] = 50,
) -> tuple[Tensor, Tensor]:
    """Fit the gradients' quadratic model of the loss under the pattern by iterative hard thresholding (CHITA).

    min ½‖A(w−w̄) + e‖² + ½Nλ‖w−w̄‖² over legal w, A being the N gradients of single batches as rows. From the largest
    weights on: a gradient step whose length a line search chooses, projection onto the pattern, and the exact solution
    on what is kept, which is an N x N system (Woodbury). The error never grows. Memory is A and a few copies of w.
    Beside another score than magnitude that score sets the mask and only the solution on it is taken.

    Differs from the paper: layers are solved one by one here (`solve` takes several together); weights are measured in
    units of their curvature, so that "largest" means w²·(Σg² + Nλ); the line search compares steps by their exact
    solutions, which take the place of coordinate descent; λ is relative to the layer and, by `diagonal` (0 in the
    paper), to each weight's own curvature; and e is scaled by `first`, 0 by default: with few gradients, fitting their
    first order fits the sample. CHITA++ is pruning the pruned model again, at ever lower density, since each run takes
    its gradients anew.

    One-shot, layer by layer, it is hardly better than Wanda at 50 % on stories15M, behind SparseGPT and many times slower
    (docs/quality.md).
    """
    gradients = [stats["gradients"]]
    ridge = ridges(gradients, damp, diagonal)
    if score is None:
        new, masks = solve(
            gradients,
            [w_OI],
            lambda ws: [select.whole(ws[0].square())],
            ridge=ridge,
            first=first,
            iterations=iterations,
        )
        return new[0], masks[0]
    mask = select.whole(score(w_OI))
    problem = Problem.make(gradients, [w_OI], ridge, first)
    return problem.best_on([mask])[0], mask


def ridges(gradients: Sequence[Tensor], damp: float, diagonal: float) -> Weights:
    """N·λ of every weight: λ = damp·(mean squared gradient) + diagonal·(the weight's own).

    Raises:
        PumiceError: `damp` is not above 0, without which the solution on a support is not unique, or `diagonal` below 0.
    """
    if not damp > 0:
        raise PumiceError(f"damp={damp} must be above 0: there are more weights than gradients.")
    if not diagonal >= 0:
        raise PumiceError(f"diagonal={diagonal} must not be negative.")
    n = gradients[0].shape[1]
    square = n * sum(float(g.square().sum()) for g in gradients) / max(1, sum(g.numel() for g in gradients))
    return [diagonal * g.square().sum(1) + (damp * square if square > 0 else 1.0) for g in gradients]


@dataclass
class Problem:
    """½‖A(w−w̄) + e‖² + ½Σ ridge·(w−w̄)² over the weights of one or several layers."""

    gradients: Sequence[Tensor]
    dense: Weights
    ridge: Weights
    offset_N: Tensor
    curvature: Weights
    """Diagonal of AᵀA + ridge."""

    @classmethod
    def make(cls, gradients: Sequence[Tensor], dense: Weights, ridge: Weights, first: float) -> Problem:
        n = gradients[0].shape[1]
        offset = torch.full((n,), first, dtype=torch.float64, device=dense[0].device)
        return cls(
            gradients, dense, ridge, offset, [g.square().sum(1) + r for g, r in zip(gradients, ridge, strict=True)]
        )

    def scaled(self, w: Weights) -> Weights:
        """The weights in units in which every one has the same curvature."""
        return [a * c.sqrt() for a, c in zip(w, self.curvature, strict=True)]

    def image(self, change: Weights) -> Tensor:
        """A·change, [N]."""
        parts = (torch.bmm(g, d[:, :, None]).sum(0)[:, 0] for g, d in zip(self.gradients, change, strict=True))
        return sum((part.double() for part in parts), torch.zeros_like(self.offset_N))

    def back(self, residual_N: Tensor) -> Weights:
        """Aᵀ·residual."""
        return [residual_N.to(g.dtype) @ g for g in self.gradients]

    def error(self, w: Weights) -> float:
        change = self.change(w)
        pull = _dot([d * r for d, r in zip(change, self.ridge, strict=True)], change)
        return float((self.image(change) + self.offset_N).square().sum() + pull) / 2

    def change(self, w: Weights) -> Weights:
        return [new - old for new, old in zip(w, self.dense, strict=True)]

    def slope(self, w: Weights) -> Weights:
        """Gradient of the error."""
        change = self.change(w)
        back = self.back(self.image(change) + self.offset_N)
        return [b + r * d for b, r, d in zip(back, self.ridge, change, strict=True)]

    def best_on(self, masks: Weights) -> Weights:
        """The exact minimum among the weights that the masks keep."""
        gram = torch.eye(len(self.offset_N), dtype=torch.float64, device=self.offset_N.device)
        for g_ONI, mask, ridge in zip(self.gradients, masks, self.ridge, strict=True):
            for g_NI, weight in zip(g_ONI.split(64), (mask / ridge.sqrt()).split(64), strict=True):
                masked = (g_NI * weight[:, None]).movedim(1, 0).flatten(1)
                gram += (masked @ masked.t()).double()
        gone = [-old * ~mask for old, mask in zip(self.dense, masks, strict=True)]
        residual = self.image(gone) + self.offset_N
        back = self.back(torch.linalg.solve(gram, residual))
        return [(old - b / r) * mask for old, b, r, mask in zip(self.dense, back, self.ridge, masks, strict=True)]


def solve(
    gradients: Sequence[Tensor],
    dense: Weights,
    project: Project,
    *,
    ridge: Weights,
    first: float = 0.0,
    iterations: int = 50,
    tolerance: float = 1e-4,
) -> tuple[Weights, Weights]:
    """New weights and their masks for layers that are pruned together; ends when a step gains less than `tolerance`.

    Args:
        gradients: [O, N, I] for every layer, the same N batches.
        project: masks by the weights; over all layers where they compete.
        ridge: see `ridges`.
    """
    problem = Problem.make(gradients, dense, ridge, first)
    masks = project(problem.scaled(dense))
    w = problem.best_on(masks)
    error = problem.error(w)
    for _ in range(iterations):
        before = error
        for found in _steps(problem, w, masks, project):
            better = problem.best_on(found)
            after = problem.error(better)
            if after < error:
                w, masks, error = better, found, after
        if not error < before * (1 - tolerance):
            break
    return w, masks


def _steps(problem: Problem, w: Weights, masks: Weights, project: Project) -> Iterator[Weights]:
    """The masks that gradient steps of several lengths lead to.

    The kept weights stand at their optimum, so that only what lets others in can gain.
    """
    slope = [s / c for s, c in zip(problem.slope(w), problem.curvature, strict=True)]
    outside = [s * ~mask for s, mask in zip(slope, masks, strict=True)]
    square = sum(float((o.square() * c).sum()) for o, c in zip(outside, problem.curvature, strict=True))
    pull = _dot([o * r for o, r in zip(outside, problem.ridge, strict=True)], outside)
    curved = float(problem.image(outside).square().sum()) + pull
    seen = masks
    for length in STEPS if square > 0 else ():
        step = length * square / curved
        found = project(problem.scaled([a - step * s for a, s in zip(w, slope, strict=True)]))
        if not all(torch.equal(a, b) for a, b in zip(found, seen, strict=True)):
            yield found
        seen = found


def _dot(a: Weights, b: Weights) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
