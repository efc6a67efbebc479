"""Erdős–Rényi densities: wide layers are pruned more."""

from __future__ import annotations

from pumice.core.errors import PumiceError
from pumice.core.registry import allocation
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
        o, i, kernel = _channels(view.shape_OI, view.tensor.shape)
        weights[view.name] = (o + i) / (o * i)
    return proportional(weights, {view.name: view.numel for view in layers.views}, density)


@allocation("erk", paper="Evci et al., arXiv:1911.11134")
def erk(layers: Layers, density: float) -> dict[str, float]:
    """Density ∝ (O + I + kh + kw)/(O·I·kh·kw): Erdős–Rényi with the kernel's extent counted in."""
    weights = {}
    for view in layers.views:
        o, i, kernel = _channels(view.shape_OI, view.tensor.shape)
        size = o * i
        for extent in kernel:
            size *= extent
        weights[view.name] = (o + i + sum(kernel)) / size
    return proportional(weights, {view.name: view.numel for view in layers.views}, density)


def _channels(shape_OI: tuple[int, int], parameter: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
    """Output channels, input channels and kernel extents; a fused 3-D expert tensor has no kernel."""
    o, columns = shape_OI
    is_kernel = len(parameter) > 2 and parameter[0] == o and columns != parameter[-1]
    kernel = tuple(parameter[2:]) if is_kernel else ()
    i = columns
    for extent in kernel:
        i //= extent
    return o, max(i, 1), kernel
