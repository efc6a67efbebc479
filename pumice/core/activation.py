"""Activation functions of perceptrons by name, and how a gate joins two halves of a hidden layer."""

from __future__ import annotations

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


def find_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name; PumiceError with the known names otherwise."""
    if name not in ACTIVATIONS:
        raise PumiceError(unknown("activation", name, ACTIVATIONS))
    return ACTIVATIONS[name]


def activate(products: Tensor, act: str, gate: str, alpha: float = 0.0, limit: float = 0.0) -> Tensor:
    """The hidden layer from the products with the first matrix: `act(p)`, or `act(gate) * partner`.

    `gate` is "none", "halves" (first all gates, then all partners) or "pairs" (they alternate). The act
    `clamped_swish` (GPT-OSS) is `(partner + 1) * gate * sigmoid(alpha * gate)`, the gate at most `limit` and its
    partner within ± `limit`.
    """
    if gate == "none":
        return ACTIVATIONS[act](products)
    first, second = products.chunk(2, dim=-1) if gate == "halves" else (products[..., ::2], products[..., 1::2])
    if act == "clamped_swish":
        first, second = first.clamp(max=limit), second.clamp(-limit, limit)
        return (second + 1) * first * torch.sigmoid(alpha * first)
    return ACTIVATIONS[act](first) * second
