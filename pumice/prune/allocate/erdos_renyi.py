"""Erdős–Rényi densities: wide layers are pruned more."""

from __future__ import annotations

import math

from pumice.core.errors import PumiceError
from pumice.core.registry import allocation
from pumice.core.view import WeightView
from pumice.prune.allocate.base import Layers


def proportional(weights: dict[str, float], sizes: dict[str, int], density: float) -> dict[str, float]:
    """Densities proportional to `weights`, capped at 1, that keep `density` of all parameters together."""
    budget = density * sum(sizes.values())
    full: set[str] = set()
    while True:
        free = [name for name in sizes if name not in full]
        if not free:
            return dict.fromkeys(sizes, 1.0)
        factor = (budget - sum(sizes[name] for name in full)) / sum(weights[name] * sizes[name] for name in free)
        over = [name for name in free if factor * weights[name] > 1]
        if not over:
            break
        full.update(over)
    if factor <= 0:
        raise PumiceError(f"density={density} is too small for an Erdős–Rényi allocation of these layers.")
    return {name: 1.0 if name in full else factor * weights[name] for name in sizes}


@allocation("er", paper="Mocanu et al., arXiv:1707.04780")
def er(layers: Layers, density: float) -> dict[str, float]:
    """Density ∝ (O + I)/(O·I), with O and I counted in channels: the larger a layer, the sparser."""
    weights = {}
    for view in layers.views:
        o, i, _ = _channels(view)
        weights[view.name] = (o + i) / (o * i)
    return proportional(weights, {view.name: view.numel for view in layers.views}, density)


@allocation("erk", paper="Evci et al., arXiv:1911.11134")
def erk(layers: Layers, density: float) -> dict[str, float]:
    """Density ∝ (O + I + kh + kw)/(O·I·kh·kw): Erdős–Rényi with the kernel's extent counted in."""
    weights = {}
    for view in layers.views:
        o, i, kernel = _channels(view)
        weights[view.name] = (o + i + sum(kernel)) / (o * i * math.prod(kernel))
    return proportional(weights, {view.name: view.numel for view in layers.views}, density)


def _channels(view: WeightView) -> tuple[int, int, tuple[int, ...]]:
    """Output channels, input channels of one group, and kernel extents (none for a matrix or a fused expert)."""
    o, columns = view.shape_OI
    kernel = tuple(view.tensor.shape[2:]) if view.expert is None else ()
    return o, columns // math.prod(kernel), kernel
