"""The dense model as an allocation sees it, before anything is pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.gradients import loss_of
from pumice.core.precision import products
from pumice.core.progress import bar
from pumice.core.stats import Stats, evaluating, split_needs
from pumice.core.stream import Collect, Source, Stream, Unit
from pumice.core.view import WeightView
from pumice.prune.allocate.base import Block, Cost, Layer, Layers
from pumice.prune.axes import Axes

CostMaker = Callable[[Sequence[WeightView]], Cost]


@dataclass
class DenseModel:
    """Gives an allocation what it may ask for, and asks it for the densities.

    `flat(view, stats)` makes a layer's statistics those of its whole view, `score(w_OI, stats)` is the recipe's score and
    `solve(view, w_OI, stats, density)` what the recipe would leave of a layer. `costs`: unit -> what layers cost in it.
    """

    model: nn.Module
    axes: Axes
    units: Sequence[Unit]
    stream: Stream | None
    source: Source
    batches: Sequence[Any]
    loss: Callable[[nn.Module, Any], Tensor] | None
    flat: Callable[[WeightView, dict[str, Tensor]], Stats]
    score: Callable[[Tensor, Stats], Tensor]
    solve: Callable[[WeightView, Tensor, dict[str, Tensor], float], Tensor]
    compute: torch.dtype = torch.float32
    seed: int = 0
    progress: bool = True
    costs: Mapping[str, CostMaker] = field(default_factory=dict)

    def densities(self) -> dict[str, float]:
        """Density of every view; layers that no calibration token reaches get the plain one."""
        axes, stream = self.axes, self.stream
        info = axes.allocation.info
        wanted = axes.allocation.needs | (axes.needs if info.extras["compares_score"] else frozenset())
        self._needs, _ = split_needs(wanted)
        found: dict[str, dict[str, Tensor]] = {}
        collects = stream is not None and bool(self._needs) and not info.extras["streams"]
        if stream is not None and collects:
            self._pass(lambda unit, collect: found.update(collect(self._needs)))
        views = [view for unit in self.units for view in unit.views if not collects or view.name in found]

        def read() -> Iterator[tuple[WeightView, Tensor, Stats]]:
            for unit in self.units:
                self.source.load(unit.name, unit.module)
                for view in unit.views:
                    if not collects or view.name in found:
                        yield view, view.read(), self.flat(view, found.get(view.name, {}))
                self.source.free(unit.name, unit.module)

        blocks = {view.name: unit.name for unit in self.units for view in unit.views}
        layers = Layers(
            views,
            blocks,
            read,
            self.score,
            walk=self._walk,
            loss=self._mean_loss,
            select=lambda view, scores, density: axes.fitted(view).select(scores, density),
            costs={unit: self._cost(make, views) for unit, make in self.costs.items()},
            seed=self.seed,
            progress=self.progress,
        )
        chosen = axes.allocation(layers, axes.density) if views else {}
        return {**dict.fromkeys(blocks, axes.density), **chosen}

    @staticmethod
    def _cost(make: CostMaker, views: Sequence[WeightView]) -> Callable[[], Cost]:
        return lambda: make(views)

    def _pass(self, visit: Callable[[Unit, Collect], None]) -> None:
        assert self.stream is not None
        title = f"allocate ({self.axes.allocation.name})"
        with bar(len(self.units), title, enabled=self.progress, unit="block") as shown:

            def step(unit: Unit, collect: Collect) -> None:
                visit(unit, collect)
                shown.update()

            self.stream.walk(step)

    def _walk(self, visit: Callable[[Block], None]) -> None:
        self._pass(lambda unit, collect: visit(Block(unit.name, lambda: self._layers(unit, collect), collect.states)))

    def _layers(self, unit: Unit, collect: Collect) -> Iterator[Layer]:
        stats = collect(self._needs) if self._needs else {}
        for view in unit.views:
            if not self._needs or view.name in stats:
                yield self._layer(view, stats.get(view.name, {}))

    def _layer(self, view: WeightView, stats: dict[str, Tensor]) -> Layer:
        w, flat, scores = view.read(), self.flat(view, stats), []

        def select(density: float) -> Tensor:
            if not scores:
                scores.append(self.score(w, flat))
            return self.axes.fitted(view).select(scores[0], density)

        return Layer(view, w, flat, select, lambda density: self.solve(view, w, stats, density))

    def _mean_loss(self, batches: int, *, exact: bool = False) -> float:
        chosen = self.batches[:batches]
        device = next(self.model.parameters()).device.type
        how = nullcontext() if exact else products(device, self.compute)
        with torch.no_grad(), evaluating(self.model), how:
            # Models add to the batch that they are given, so each call gets its own dictionary.
            values = [float(loss_of(self.model, dict(b) if isinstance(b, Mapping) else b, self.loss)) for b in chosen]
        mean = sum(values) / len(values)
        if mean != mean or mean in (float("inf"), float("-inf")):
            raise PumiceError(
                f"allocation {self.axes.allocation.name!r}: the model's loss is {mean}; look at the data."
            )
        return mean
