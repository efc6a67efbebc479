"""What an allocation is given, and the arithmetic that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.stats import Stats
from pumice.core.view import WeightView


@dataclass
class Layers:
    """All prunable layers, their dense statistics and their scores, loaded one after the other."""

    views: list[WeightView]
    blocks: Mapping[str, str]
    """View name -> name of the block it belongs to."""
    read: Callable[[], Iterator[tuple[WeightView, Tensor, Stats]]]
    """Every view with its weight and statistics; can be called again."""
    score: Callable[[Tensor, Stats], Tensor]
    """The recipe's own score."""


def by_threshold(
    layers: Layers, density: float, scores: Callable[[Tensor, Stats], Tensor], minimum: float
) -> dict[str, float]:
    """Densities of the layers when all weights of the model compete by one score.

    A layer that would fall under `minimum` is held there, and the others share what is left, until none falls.
    """
    sizes = {view.name: view.numel for view in layers.views}
    budget = select.keep_count(sum(sizes.values()), density)
    held: dict[str, float] = {}
    while True:
        free = [name for name in sizes if name not in held]
        left = budget - sum(round(held[name] * sizes[name]) for name in held)
        if left < len(free):
            raise PumiceError(f"density={density} leaves nothing to share with at least {minimum} kept in every layer.")
        if not free:
            return held
        threshold = select.kth_largest_streamed(
            lambda: (scores(w, stats) for view, w, stats in layers.read() if view.name not in held), left
        )
        found = {
            view.name: float((scores(w, stats).float() >= threshold).float().mean())
            for view, w, stats in layers.read()
            if view.name not in held
        }
        low = [name for name, share in found.items() if share < minimum]
        if not low:
            return {**held, **found}
        held.update(dict.fromkeys(low, minimum))
