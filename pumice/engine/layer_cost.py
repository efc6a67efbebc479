"""What a layer costs in time here: the fastest packed form at each density, for allocations with a budget in ms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pumice.core.errors import PumiceError
from pumice.core.view import WeightView
from pumice.engine.pack import COLD_BYTES
from pumice.engine.verdicts import Asked, verdict_of
from pumice.prune.allocate.base import Cost
from pumice.weights.layouts.base import pack as pack_as
from pumice.weights.modules import SparseLinear, sparse_twin

LEVELS = 10
"""Densities at which a shape is timed; between them time is interpolated linearly."""


def linear_milliseconds(views: Sequence[WeightView]) -> Cost:
    """Milliseconds of each layer for one row (decoding one token), run as `pack` would run it on this machine.

    Dense where that is fastest. Timed with random masks and weights out of cache, once for each shape and type, and kept
    on disk like other verdicts. What is not pruned (attention itself, norms, embeddings, head) is not counted.
    """
    budget = min(COLD_BYTES, sum(view.numel * view.tensor.element_size() for view in views))
    curves: dict[tuple[int, int, torch.dtype], list[float]] = {}

    def of(view: WeightView, mask_OI: Tensor) -> float:
        if sparse_twin(view.module) is not SparseLinear:
            raise PumiceError(
                f"budget in ms: layer {view.name} is a {type(view.module).__name__}, and only linear layers are timed: "
                "leave it out with ignore, or give the budget in bytes."
            )
        key = (*view.shape_OI, view.tensor.dtype)
        if key not in curves:
            curves[key] = [_time(key, level / LEVELS, budget) for level in range(1, LEVELS + 1)]
        density = float(mask_OI.float().mean()) * LEVELS
        low = min(max(int(density), 1), LEVELS - 1)
        return max(0.0, curves[key][low - 1] + (density - low) * (curves[key][low] - curves[key][low - 1]))

    return Cost(of, kind=lambda view: type(view.module))


def _time(key: tuple[int, int, torch.dtype], density: float, budget: int) -> float:
    o, i, dtype = key
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(o, i, generator=generator)
    w *= torch.rand(o, i, generator=generator) < density
    return verdict_of(pack_as(w.to(dtype), "dense"), Asked((1,), budget)).ms(1)
