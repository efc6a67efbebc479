"""What an allocation is given, and the arithmetic that several of them share."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.stats import Stats
from pumice.core.view import WeightView


@dataclass
class Layer:
    """One layer of the dense model while calibration data pass through it."""

    view: WeightView
    w_OI: Tensor
    stats: Stats
    select: Callable[[float], Tensor]
    """Density -> the mask that the recipe's score and pattern choose."""
    recover: Callable[[float], Tensor]
    """Density -> the weights that the whole recipe, recovery and goal included, would leave."""


@dataclass
class Block:
    """One block of the dense model with the calibration data in front of it."""

    name: str
    layers: Callable[[], Iterator[Layer]]
    """Its layers that a token reaches, with the statistics that the allocation needs."""
    states: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    """Hidden states in front of it and behind it, batch by batch, [T, D] each."""


@dataclass
class Cost:
    """What layers cost in some unit: `of(view, mask_OI)`, and `fixed` for everything that is not pruned.

    Layers of one shape and type cost the same if `kind` says the same of them.
    """

    of: Callable[[WeightView, Tensor], float]
    fixed: float = 0.0
    kind: Callable[[WeightView], Any] = lambda view: None


class Loss(Protocol):
    """Mean loss of the model as it is now over the first `batches` calibration batches.

    `exact` computes in float32 whatever the calibration computes in.
    """

    def __call__(self, batches: int, *, exact: bool = False) -> float: ...


def _missing(*_: Any, **__: Any) -> Any:
    raise PumiceError("this allocation runs the model, which is not there: use it through pumice.prune.")


@dataclass
class Layers:
    """All prunable layers, their dense statistics and their scores, loaded one after the other.

    An allocation that is registered with `streams=True` calls `walk`, which shows it each block once and keeps nothing;
    the others find the statistics of all layers in `read`.
    """

    views: list[WeightView]
    blocks: Mapping[str, str]
    """View name -> name of the block it belongs to."""
    read: Callable[[], Iterator[tuple[WeightView, Tensor, Stats]]]
    """Every view with its weight and statistics; can be called again."""
    score: Callable[[Tensor, Stats], Tensor]
    """The recipe's own score."""
    walk: Callable[[Callable[[Block], None]], None] = _missing
    """One pass of the calibration data through the dense model, block by block."""
    loss: Loss = _missing
    select: Callable[[WeightView, Tensor, float], Tensor] = _missing
    """(view, scores_OI, density) -> mask in the recipe's pattern."""
    costs: Mapping[str, Callable[[], Cost]] = field(default_factory=dict)
    """Unit -> what a layer costs in it."""
    seed: int = 0
    progress: bool = False


@contextmanager
def changed(views: Sequence[WeightView], change: Callable[[WeightView, Tensor], Tensor]) -> Iterator[None]:
    """The views' weights as `change(view, w_OI)` makes them; afterwards they are, bit by bit, what they were."""
    before = [view.matrix().clone() for view in views]
    try:
        for view in views:
            view.write(change(view, view.read()))
        yield
    finally:
        for view, matrix in zip(views, before, strict=True):
            view.write(matrix)


def noise(view: WeightView, seed: int, draw: int) -> Tensor:
    """Standard normal noise [O, I] that depends on the seed, the layer's name and the draw only."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{view.name}:{draw}".encode()))
    return torch.randn(view.shape_OI, generator=generator)


def share(weights: Mapping[str, float], caps: Mapping[str, float], total: float) -> dict[str, float]:
    """Amounts proportional to `weights`, clipped at `caps`, that sum to `total`; what is clipped goes to the others.

    Where nothing has weight any more, the rest is shared in proportion to what room is left.

    Raises:
        PumiceError: the caps together are less than the total.
    """
    room = sum(caps.values())
    if total > room * (1 + 1e-9) or total < 0:
        raise PumiceError(f"an allocation cannot share {total:g} weights where {room:g} fit.")
    amounts = dict.fromkeys(weights, 0.0)
    free = [name for name in weights if caps[name] > 0]
    while free:
        left = total - sum(amounts[name] for name in amounts if name not in free)
        mass = sum(weights[name] for name in free)
        key = {name: weights[name] if mass > 0 else caps[name] for name in free}
        factor = left / sum(key.values())
        over = [name for name in free if factor * key[name] >= caps[name]]
        amounts.update({name: caps[name] if name in over else factor * key[name] for name in free})
        if not over:
            break
        free = [name for name in free if name not in over]
    return amounts


def whole(amounts: Mapping[str, float], caps: Mapping[str, int], total: int) -> dict[str, int]:
    """Whole numbers near `amounts`, at least one and at most `caps` each, that sum to `total` (largest remainder).

    Raises:
        PumiceError: the total leaves not one for each, or is more than the caps.
    """
    if not len(amounts) <= total <= sum(caps.values()):
        raise PumiceError(
            f"an allocation cannot share {total} weights between {len(amounts)} layers of {sum(caps.values())}: each keeps "
            "at least one; keep more."
        )
    counts = {name: min(caps[name], max(1, math.floor(value + 1e-9))) for name, value in amounts.items()}
    while (left := total - sum(counts.values())) != 0:
        step = 1 if left > 0 else -1
        able = [name for name in counts if (counts[name] < caps[name] if left > 0 else counts[name] > 1)]
        able.sort(key=lambda name: step * (amounts[name] - counts[name]), reverse=True)
        for name in able[: abs(left)]:
            counts[name] += step
    return counts


def exact(amounts: Mapping[str, float], layers: Layers, density: float) -> dict[str, float]:
    """Densities of whole keep counts near `amounts` (weights to keep) that keep `density` of all weights exactly."""
    sizes = {view.name: view.numel for view in layers.views}
    counts = whole(amounts, sizes, max(len(sizes), select.keep_count(sum(sizes.values()), density)))
    return {name: counts[name] / sizes[name] for name in sizes}


def proportional(weights: Mapping[str, float], layers: Layers, density: float) -> dict[str, float]:
    """Densities proportional to `weights`, capped at 1, that keep `density` of all weights exactly."""
    sizes = {view.name: view.numel for view in layers.views}
    budget = select.keep_count(sum(sizes.values()), density)
    amounts = share({name: weights[name] * sizes[name] for name in sizes}, sizes, budget)
    return exact(amounts, layers, density)


def by_threshold(
    layers: Layers, density: float, scores: Callable[[Tensor, Stats], Tensor], minimum: float
) -> dict[str, float]:
    """Densities of the layers when all weights of the model compete by one score.

    A layer that would fall under `minimum`, or be emptied, is held there, and the others share what is left, until
    none falls. Among equal scores the earlier layer wins, so that the counts are exact.
    """
    sizes = {view.name: view.numel for view in layers.views}
    budget = select.keep_count(sum(sizes.values()), density)
    held: dict[str, int] = {}
    while True:
        left, free = budget - sum(held.values()), len(sizes) - len(held)
        if left < free:
            raise PumiceError(
                f"density={density} leaves nothing to share with at least {minimum} kept in every layer: keep more, or "
                "use a smaller minimum."
            )
        if not free:
            return {name: held[name] / sizes[name] for name in sizes}
        found = _compete(layers, left, scores, held)
        low = [name for name, count in found.items() if count < max(1, minimum * sizes[name])]
        held.update({name: select.keep_count(sizes[name], minimum) for name in low} if low else found)


def _compete(
    layers: Layers, keep: int, scores: Callable[[Tensor, Stats], Tensor], held: Mapping[str, int]
) -> dict[str, int]:
    """How many of the `keep` best weights lie in each layer that is not held."""

    def parts() -> Iterator[tuple[str, Tensor]]:
        return ((view.name, scores(w, stats).float()) for view, w, stats in layers.read() if view.name not in held)

    threshold = select.kth_largest_streamed(lambda: (part for _, part in parts()), keep)
    above: dict[str, int] = {}
    equal: dict[str, int] = {}
    for name, part in parts():
        above[name], equal[name] = int((part > threshold).sum()), int((part == threshold).sum())
    room = keep - sum(above.values())
    for name, ties in equal.items():
        taken = min(ties, room)
        above[name] += taken
        room -= taken
    return above
