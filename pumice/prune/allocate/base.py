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
