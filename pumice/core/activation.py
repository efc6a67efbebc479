"""Activation functions of perceptrons by name, and how a gate joins two halves of a hidden layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.core.errors import PumiceError
from pumice.core.registry import unknown


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu_squared,
    "sigmoid": torch.sigmoid,
}


def _silu_slope(x: Tensor) -> Tensor:
    share = torch.sigmoid(x)
    return share * (1 + x * (1 - share))


def _gelu_slope(x: Tensor) -> Tensor:
    return torch.special.ndtr(x) + x * torch.exp(-x.square() / 2) * (2 * math.pi) ** -0.5


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    # 0.5 (1 + tanh(z)) is sigmoid(2 z).
    twice = math.sqrt(8 / math.pi)
    share = torch.sigmoid(twice * (x + 0.044715 * x**3))
    return share + x * share * (1 - share) * twice * (1 + 3 * 0.044715 * x.square())


def _relu_slope(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _relu_squared_slope(x: Tensor) -> Tensor:
    return 2 * F.relu(x)


def _sigmoid_slope(x: Tensor) -> Tensor:
    share = torch.sigmoid(x)
    return share * (1 - share)


SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu_slope,
    "gelu": _gelu_slope,
    "gelu_tanh": _gelu_tanh_slope,
    "relu": _relu_slope,
    "relu2": _relu_squared_slope,
    "sigmoid": _sigmoid_slope,
}
"""The derivative of every activation."""


def find_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name; PumiceError with the known names otherwise."""
    if name not in ACTIVATIONS:
        raise PumiceError(unknown("activation", name, ACTIVATIONS))
    return ACTIVATIONS[name]


def _parts(products: Tensor, gate: str) -> tuple[Tensor, Tensor]:
    """The gates and their partners, as views."""
    if gate == "pairs":
        return products[..., ::2], products[..., 1::2]
    width = products.shape[-1] // 2
    return products[..., :width], products[..., width:]


def activate(products: Tensor, act: str, gate: str, alpha: float = 0.0, limit: float = 0.0) -> Tensor:
    """The hidden layer from the products with the first matrix: `act(p)`, or `act(gate) * partner`.

    `gate` is "none", "halves" (first all gates, then all partners) or "pairs" (they alternate). The act
    `clamped_swish` (GPT-OSS) is `(partner + 1) * gate * sigmoid(alpha * gate)`, the gate at most `limit` and its
    partner within ± `limit`.
    """
    if gate == "none":
        return ACTIVATIONS[act](products)
    first, second = _parts(products, gate)
    if act == "clamped_swish":
        first, second = first.clamp(max=limit), second.clamp(-limit, limit)
        return (second + 1) * first * torch.sigmoid(alpha * first)
    return ACTIVATIONS[act](first) * second


def activate_backward(
    products: Tensor, gradient: Tensor, scale_A: Tensor | None, act: str, gate: str, alpha: float, limit: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the backward pass of `s · activate(p)` needs, from the gradient of that scaled hidden layer.

    Returns `s · activate(p)`, the gradient of p, and that of the scale s_A (float32 at least; None without a scale):
    `Σ gradient · activate(p)` over a row. Half precision is widened in between.
    """
    wide = torch.promote_types(products.dtype, torch.float32)
    p, g = products.to(wide), gradient.to(wide)
    scale_A1 = None if scale_A is None else scale_A.to(wide)[:, None]
    scaled = g if scale_A1 is None else g * scale_A1
    if gate == "none":
        hidden, to_products = ACTIVATIONS[act](p), scaled * SLOPES[act](p)
    else:
        first, second = _parts(p, gate)
        gated = scaled
        if act == "clamped_swish":
            gated = torch.where(first <= limit, scaled, 0)
            to_second = torch.where(second.abs() <= limit, scaled, 0)
            first, second = first.clamp(max=limit), second.clamp(-limit, limit) + 1
            share = torch.sigmoid(alpha * first)
            acted, slope = first * share, share * (1 + alpha * first * (1 - share))
        else:
            to_second, acted, slope = scaled, ACTIVATIONS[act](first), SLOPES[act](first)
        hidden = acted * second
        to_products = torch.empty_like(p)
        to_first, to_partner = _parts(to_products, gate)
        torch.mul(gated * second, slope, out=to_first)
        torch.mul(to_second, acted, out=to_partner)
    to_scale = None if scale_A1 is None else (g * hidden).sum(1)
    hidden = hidden if scale_A1 is None else hidden * scale_A1
    return hidden.to(products.dtype), to_products.to(products.dtype), to_scale
