"""Erdős–Rényi densities: wide layers are pruned more."""

from __future__ import annotations

import math

from pumice.core.registry import allocation
from pumice.core.view import WeightView
from pumice.prune.allocate.base import Layers, share


def _densities(weights: dict[str, float], layers: Layers, density: float) -> dict[str, float]:
    sizes = {view.name: view.numel for view in layers.views}
    amounts = share({name: weights[name] * sizes[name] for name in sizes}, sizes, density * sum(sizes.values()))
    return {name: amounts[name] / sizes[name] for name in sizes}


@allocation("er", paper="Mocanu et al., arXiv:1707.04780")
def er(layers: Layers, density: float) -> dict[str, float]:
    """Density ∝ (O + I)/(O·I), with O and I counted in channels: the larger a layer, the sparser."""
    weights = {}
    for view in layers.views:
        o, i, _ = _channels(view)
        weights[view.name] = (o + i) / (o * i)
    return _densities(weights, layers, density)


@allocation("erk", paper="Evci et al., arXiv:1911.11134")
def erk(layers: Layers, density: float) -> dict[str, float]:
    """Density ∝ (O + I + kh + kw)/(O·I·kh·kw): Erdős–Rényi with the kernel's extent counted in."""
    weights = {}
    for view in layers.views:
        o, i, kernel = _channels(view)
        weights[view.name] = (o + i + sum(kernel)) / (o * i * math.prod(kernel))
    return _densities(weights, layers, density)


def _channels(view: WeightView) -> tuple[int, int, tuple[int, ...]]:
    """Output channels, input channels of one group, and kernel extents (none for a matrix or a fused expert)."""
    o, columns = view.shape_OI
    kernel = tuple(view.tensor.shape[2:]) if view.expert is None else ()
    return o, columns // math.prod(kernel), kernel
