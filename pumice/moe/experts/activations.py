"""Activation functions of experts, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pumice.core.activation import ACTIVATIONS
from pumice.core.errors import PumiceError
from pumice.core.registry import unknown


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name; PumiceError with the known names otherwise."""
    if name not in ACTIVATIONS:
        raise PumiceError(unknown("activation", name, ACTIVATIONS))
    return ACTIVATIONS[name]
