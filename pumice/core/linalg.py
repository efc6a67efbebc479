"""The few matrix solves that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.core.errors import PumiceError


def damped_cholesky(hessian_II: Tensor, damp: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of H + damp·mean(diag H)·I, and the damping that it took.

    Inputs that are always zero get a one on the diagonal. If the matrix is not positive definite, the damping is
    raised ten-fold until it is.

    Raises:
        PumiceError: H is not finite, `damp` is negative, or no damping up to 10 helps.
    """
    if not damp >= 0:
        raise PumiceError(f"damp={damp} must not be negative.")
    if not torch.isfinite(hessian_II).all():
        raise PumiceError("the Hessian holds NaN or Inf: look at the calibration activations of this layer.")
    hessian = hessian_II.clone()
    diagonal = torch.diagonal(hessian)
    mean = float(diagonal.mean())
    diagonal[diagonal <= 0] = mean if mean > 0 else 1.0
    tried = damp
    while tried <= 10 * max(damp, 1.0):
        lower, info = torch.linalg.cholesky_ex(hessian + torch.eye(len(hessian)).to(hessian) * (tried * mean))
        if int(info) == 0 and torch.isfinite(lower).all():
            return lower, tried
        tried = max(tried * 10, 1e-4)
    raise PumiceError(f"the Hessian is not positive definite even with damp={tried / 10:g}: use more calibration data.")


def damped_inverse(hessian_II: Tensor, damp: float) -> tuple[Tensor, float]:
    """Inverse of the damped Hessian, and the damping that it took."""
    lower, used = damped_cholesky(hessian_II, damp)
    return torch.cholesky_inverse(lower), used


def inverse_factor(hessian_II: Tensor, damp: float) -> tuple[Tensor, float]:
    """Upper triangular U with (H + damping)⁻¹ = UᵀU, and the damping that it took.

    Read backwards, H = R Rᵀ with R upper triangular, so that U = R⁻¹: one factorisation and one triangular inverse
    instead of inverting H and factorising the inverse.
    """
    lower, used = damped_cholesky(hessian_II.flip(0, 1), damp)
    r = lower.flip(0, 1)
    eye = torch.eye(len(r), dtype=r.dtype, device=r.device)
    return torch.linalg.solve_triangular(r, eye, upper=True), used


def refit(
    hessian_II: Tensor, goal_OI: Tensor, mask_OI: Tensor, start_OI: Tensor, *, steps: int, tolerance: float = 1e-4
) -> Tensor:
    """The weights on `mask` that come nearest to `goal`: argmin tr((W−G) H (W−G)ᵀ), all rows at once.

    Conjugate gradients, preconditioned by H's diagonal and restricted to each row's support, from `start` (zeros
    outside the mask are kept). The error never grows from step to step; with as many steps as a row keeps weights the
    result is exact. Rows that are within `tolerance` of their first residual stand still.

    Args:
        hessian_II: positive definite (damp it first).
    """
    scale = torch.diagonal(hessian_II).rsqrt()
    normed = hessian_II * scale * scale[:, None]
    mask = mask_OI.to(goal_OI.dtype)
    start = start_OI * mask
    change = torch.zeros_like(start)
    residual = (((goal_OI - start) / scale) @ normed) * mask
    direction = residual.clone()
    square = residual.square().sum(1, keepdim=True)
    first = square.clone()
    for _ in range(steps):
        if not bool((square > first * tolerance**2).any()):
            break
        image = (direction @ normed) * mask
        curvature = (direction * image).sum(1, keepdim=True)
        # A row that has arrived has no direction left; it must not divide by zero.
        step = torch.where(curvature > 0, square / curvature.clamp(min=1e-30), 0)
        change.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        before, square = square, residual.square().sum(1, keepdim=True)
        ratio = torch.where(before > 0, square / before.clamp(min=1e-30), 0)
        direction.mul_(ratio).add_(residual)
    return start + change * scale


def damped(hessian_II: Tensor, damp: float) -> Tensor:
    """H + damp·mean(diag H)·I, with a one (or that mean) for inputs that are always zero; a copy."""
    hessian = hessian_II.clone()
    diagonal = torch.diagonal(hessian)
    mean = float(diagonal.mean())
    diagonal[diagonal <= 0] = mean if mean > 0 else 1.0
    diagonal += damp * (mean if mean > 0 else 1.0)
    return hessian
