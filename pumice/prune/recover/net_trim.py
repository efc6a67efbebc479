"""Net-Trim: the sparsest layer in the sense of ‖U‖₁ that reproduces the layer's responses, by convex optimisation.

Shapes: O outputs, I inputs, S sampled inputs.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from pumice.core.errors import PumiceError
from pumice.core.linalg import damped, refit
from pumice.core.registry import recovery
from pumice.core.stats import Stats
from pumice.prune.layer import Score, Selector

LEAST, MOST = 1e-4, 1.0
"""Where ε is looked for, as a share of the size of the responses."""
THRESHOLD = 0.1
"""Soft threshold 1/ρ of the splitting, as a share of the mean weight: decides how fast it settles, not where."""
ROUNDS = 10
"""Times that the refit behind a ReLU takes its targets anew."""


@recovery(
    "net-trim",
    simpler="obs",
    key="net-trim",
    paper="arXiv:1806.06457",
    needs=("hessian", "input", "bias"),
    selects="magnitude",
)
def net_trim(
    w_OI: Tensor,
    stats: Stats,
    score: Score | None,
    select: Selector,
    *,
    relu: Annotated[bool, "the layers are followed by a ReLU: only its responses have to be kept"] = False,
    damp: Annotated[float, "share of the mean Hessian diagonal added to it for the refit"] = 0.01,
    bisections: Annotated[int, "values of ε tried to meet the density"] = 8,
    iterations: Annotated[int, "steps of the splitting for each ε"] = 30,
    refine: Annotated[
        int, "steps of conjugate gradients on the final mask; 0 leaves the weights as the ℓ1 solution"
    ] = 20,
) -> tuple[Tensor, Tensor]:
    """min ‖U‖₁ subject to ‖X(U−W)ᵀ‖ ≤ ε, by operator splitting with one cached factorisation (Net-Trim).

    With `relu` only responses above zero are held to ε, and where the layer gave nothing X Uᵀ + b has to stay at most
    zero; without it (layers that no ReLU follows, as in gated transformers) all responses count, which is the linear
    form. ε is bisected until the solution has about the density asked for; then its largest entries are the mask, so
    that density and pattern are met exactly, and the kept weights are fitted again, as ℓ1 shrinks them (this refit is
    not the paper's). Beside another score than magnitude that score sets the mask and only the refit is done.

    The linear form uses E[xxᵀ] of all calibration tokens, the ReLU form the sample of inputs (about 512 of them).
    Which layers a ReLU follows is for `targets` to say.
    """
    if bisections < 1 or iterations < 1:
        raise PumiceError(f"bisections={bisections} and iterations={iterations} must both be at least 1.")
    responses = _Rectified(w_OI, stats["input"], stats["bias"]) if relu else _Linear(w_OI, stats["hessian"])
    found = w_OI
    if score is not None:
        mask = select.whole(score(w_OI))
    else:
        found, order = _sparsest(w_OI, responses, select.density, bisections, iterations)
        mask = select.whole(order.square())
    if bool(mask.all()):
        return w_OI, mask
    return (responses.refit(mask, found * mask, damp, refine) if refine else found * mask), mask


class _Linear:
    """Responses X Uᵀ that have to be near X Wᵀ, known by H = E[xxᵀ] alone: their copy is held as the weights of it."""

    def __init__(self, w_OI: Tensor, hessian_II: Tensor) -> None:
        self.w, self.hessian = w_OI, hessian_II
        mean = float(torch.diagonal(hessian_II).mean())
        self.h = hessian_II / mean if mean > 0 else torch.eye(len(hessian_II)).to(hessian_II)
        eye = torch.eye(len(self.h), dtype=self.h.dtype, device=self.h.device)
        self.solver = torch.cholesky_inverse(torch.linalg.cholesky(self.h + eye))
        self.size = self._norm(w_OI)
        self.dual = torch.zeros_like(w_OI)

    def _norm(self, d_OI: Tensor) -> float:
        return max(float(((d_OI @ self.h) * d_OI).sum()), 0.0) ** 0.5

    def step(self, u_OI: Tensor, sparse_OI: Tensor, eps: float) -> Tensor:
        """The dense copy that is nearest both to the allowed responses and to the sparse copy."""
        off = u_OI + self.dual - self.w
        norm = self._norm(off)
        allowed = self.w + off * min(1.0, eps * self.size / norm if norm > 0 else 1.0)
        self.dual = self.dual + u_OI - allowed
        goal = allowed - self.dual
        return goal + (sparse_OI - goal) @ self.solver

    def refit(self, mask_OI: Tensor, start_OI: Tensor, damp: float, steps: int) -> Tensor:
        return refit(damped(self.hessian, damp), self.w, mask_OI, start_OI, steps=steps)


class _Rectified:
    """Responses relu(X Uᵀ + b) on a sample: near the old ones where those are above zero, at most zero elsewhere."""

    def __init__(self, w_OI: Tensor, x_SI: Tensor, bias_O: Tensor) -> None:
        scale = float(x_SI.square().mean()) ** 0.5 * len(x_SI) ** 0.5
        self.x = x_SI / scale if scale > 0 else x_SI
        self.limit_O = -bias_O / scale if scale > 0 else -bias_O
        self.image = self.x @ w_OI.t()
        self.on = self.image > self.limit_O
        self.size = float((self.image * self.on).norm())
        gram = self.x.t() @ self.x
        self.gram = gram
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        self.solver = torch.cholesky_inverse(torch.linalg.cholesky(gram + eye))
        self.dual = torch.zeros_like(self.image)

    def nearest(self, z_SO: Tensor, eps: float) -> Tensor:
        """Projection onto the allowed responses."""
        off = (z_SO - self.image) * self.on
        norm = float(off.norm())
        close = self.image + off * min(1.0, eps * self.size / norm if norm > 0 else 1.0)
        return torch.where(self.on, close, torch.minimum(z_SO, self.limit_O))

    def step(self, u_OI: Tensor, sparse_OI: Tensor, eps: float) -> Tensor:
        image = self.x @ u_OI.t()
        allowed = self.nearest(image + self.dual, eps)
        self.dual = self.dual + image - allowed
        return ((allowed - self.dual).t() @ self.x + sparse_OI) @ self.solver

    def refit(self, mask_OI: Tensor, start_OI: Tensor, damp: float, steps: int) -> Tensor:
        """Each round fits the nearest allowed responses; their distance never grows."""
        hessian, u = damped(self.gram, damp), start_OI
        for _ in range(ROUNDS):
            image = self.x @ u.t()
            missing = self.nearest(image, 0.0) - image
            goal = u + torch.linalg.solve(hessian, self.x.t() @ missing).t()
            u = refit(hessian, goal, mask_OI, u, steps=steps)
        return u


def _sparsest(
    w_OI: Tensor, responses: _Linear | _Rectified, density: float, bisections: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """The sparse copy at the ε whose solution has about this density, and what its entries were before the threshold.

    One run: each ε starts from where the last one ended.
    """
    cut = THRESHOLD * float(w_OI.abs().mean())
    low, high = LEAST, MOST
    u, sparse, dual = w_OI, w_OI, torch.zeros_like(w_OI)
    before = w_OI
    for _ in range(bisections):
        eps = (low * high) ** 0.5
        for _ in range(iterations):
            u = responses.step(u, sparse - dual, eps)
            before = u + dual
            sparse = before.sign() * (before.abs() - cut).clamp(min=0)
            dual = before - sparse
        if torch.count_nonzero(sparse) > density * sparse.numel():
            low = eps
        else:
            high = eps
    return sparse, before
