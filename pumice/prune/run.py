"""One-shot pruning of a model: allocate, then walk block by block, score, select, recover, write."""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.core.gradients import gradients_bytes, model_stats
from pumice.core.progress import bar
from pumice.core.registry import Bound
from pumice.core.stats import MADE_STATS, Stats, split_needs
from pumice.core.stream import Collect, InMemory, Source, Stream, Unit, find_units
from pumice.core.view import WeightView, find_views
from pumice.prune.allocate.cost import stored_bytes
from pumice.prune.axes import Axes
from pumice.prune.dense import CostMaker, DenseModel
from pumice.prune.layer import Given, Selector
from pumice.weights.grid import Grid, keep, stacked


@dataclass
class LayerResult:
    """What happened to one weight."""

    name: str
    block: str
    shape: tuple[int, int]
    density: float
    """Share of weights that are not zero."""
    asked: float
    error: float | None
    """‖X(W−W')ᵀ‖ / ‖XWᵀ‖ on a sample of the layer's calibration inputs; None where nothing was calibrated."""
    weight_error: float
    """‖W−W'‖ / ‖W‖."""
    seconds: float
    method: str
    notes: list[str] = field(default_factory=list)


@dataclass
class PruneResult:
    """Per-layer density, error and time, and the whole."""

    recipe: dict[str, Any]
    layers: list[LayerResult]
    seconds: float
    peak_memory_bytes: int
    notes: list[str] = field(default_factory=list)
    resumed_units: int = 0
    path: str | None = None
    repair: dict[str, Any] | None = None
    """What the repairs after it did, where some were asked for."""

    @property
    def density(self) -> float:
        """Share of nonzero weights over all pruned layers."""
        total = sum(o * i for o, i in (layer.shape for layer in self.layers))
        return sum(layer.density * layer.shape[0] * layer.shape[1] for layer in self.layers) / max(total, 1)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "density": self.density}


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def random_scores(shape: tuple[int, int], seed: int, name: str) -> Tensor:
    """Noise that depends on the seed and the layer's name only, so that a resumed run draws the same."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return torch.rand(shape, generator=generator)


class Pruner:
    """Prunes the views of a model in place by one set of axes.

    Args:
        batches: calibration batches as the model takes them; may be empty if nothing needs data.
        compute: dtype of the matrix products while calibrating.
        source: loads and frees units of a model that is not in memory.
        loss: `f(model, batch) -> scalar` for gradient statistics of models that return no loss.
        finished: called after each unit with its layer results (to write it away).
        done: units that an earlier, interrupted run finished: name -> their results. They only feed the next ones.
        densities: the layers' densities as that run had allocated them, since the model is no longer dense.
        masks: masks by view name that are decided already: the recovery solves for the weights on them.
        costs: unit -> what layers cost in it, for allocations with a budget; bytes are known here.
    """

    def __init__(
        self,
        model: nn.Module,
        axes: Axes,
        batches: Sequence[Any] = (),
        *,
        compute: torch.dtype = torch.float32,
        source: Source | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        seed: int = 0,
        progress: bool = True,
        finished: Callable[[Unit, list[LayerResult]], None] | None = None,
        done: dict[str, list[LayerResult]] | None = None,
        densities: dict[str, float] | None = None,
        masks: dict[str, Tensor] | None = None,
        costs: Mapping[str, CostMaker] | None = None,
    ) -> None:
        self.model, self.axes, self.batches, self.compute = model, axes, list(batches), compute
        self.source, self.loss, self.seed, self.progress = source or InMemory(), loss, seed, progress
        self.finished, self.done, self.masks = finished, done or {}, masks or {}
        self.views = find_views(model, axes.targets, axes.ignore)
        axes.check_views(self.views)
        self.layer_needs, self.model_needs = split_needs(axes.needs)
        if axes.needs_data and not self.batches:
            wanted = ", ".join(sorted((axes.needs | axes.allocation.needs) - MADE_STATS.keys()))
            raise PumiceError(
                f"data=None: method {axes.name!r} measures {wanted} and needs calibration data; pass data=…."
            )
        self.notes: list[str] = []
        self._blurred: list[str] = []
        self._whole: dict[str, dict[str, Tensor]] = {}
        self.densities = dict(densities or {})
        self.costs = dict(costs or {})

    def measure_dense(self) -> None:
        """Take what is known of the dense model only: whole-model gradients, and densities where they are not given.

        `run` does this first; a resumed run in memory calls it before it puts the finished units in.
        """
        shared = self.model_needs | (frozenset() if self.densities else split_needs(self.axes.allocation.needs)[1])
        if shared and not self._whole:
            self._whole = self._model_stats(shared)
        if self.densities:
            return
        stream = self._stream(dense=False)
        units = stream.units + stream.unreached if stream else find_units(self.model, self.views)
        self.densities = self._allocate(units, stream)
        self._whole = {
            name: {key: value for key, value in stats.items() if key in self.model_needs}
            for name, stats in self._whole.items()
        }

    def _stream(self, dense: bool) -> Stream | None:
        if not self.batches:
            return None
        return Stream(self.model, self.views, self.batches, compute=self.compute, source=self.source, dense=dense)

    def run(self) -> PruneResult:
        """Prune everything; an exception leaves the finished units pruned and the others as they were."""
        start = time.perf_counter()
        self.measure_dense()
        # Without data the blocks come in module order; with data, the stream knows the order of execution.
        stream = self._stream(dense="drift" in self.layer_needs)
        units = stream.units + stream.unreached if stream else find_units(self.model, self.views)
        layers: list[LayerResult] = []
        with bar(len(units), f"prune ({self.axes.name})", enabled=self.progress, unit="block") as shown:

            def visit(unit: Unit, collect: Collect | None) -> None:
                layers.extend(self._prune_unit(unit, collect))
                shown.update()

            if stream and self.layer_needs | {"input"}:
                stream.walk(visit)
                rest = stream.unreached
            else:
                rest = units
            for unit in rest:
                self.source.load(unit.name, unit.module)
                visit(unit, None)
                self.source.free(unit.name, unit.module)
        for name in sorted(stream.unpaired) if stream else ():
            self.notes.append(f"{name}: gets other tokens in the dense model, so that it reproduces its own outputs")
        if self._blurred:
            self.notes.append(
                f"{len(self._blurred)} layers (first {self._blurred[0]}) have more inputs than there were calibration "
                "tokens: where nothing was seen only the Hessian's damping decides; take more or longer samples"
            )
        seconds = time.perf_counter() - start
        return PruneResult(
            self.axes.describe(), layers, seconds, peak_memory_bytes(), self.notes, resumed_units=len(self.done)
        )

    def _model_stats(self, needs: frozenset[str]) -> dict[str, dict[str, Tensor]]:
        if not isinstance(self.source, InMemory):
            wanted = ", ".join(sorted(needs))
            raise PumiceError(
                f"method {self.axes.name!r} needs {wanted} of the whole model at once, which a model streamed from disk "
                "cannot give: load it into memory, or use wanda or sparsegpt."
            )
        batches = [dict(b) if isinstance(b, dict) else b for b in self.batches]
        if "gradients" in needs:
            size = gradients_bytes(self.views, len(batches))
            self.notes.append(
                f"the gradients of {len(batches)} batches took {size:,} bytes of memory; fewer samples take less"
            )
        return model_stats(self.model, self.views, batches, needs, self.loss)

    def _allocate(self, units: Sequence[Unit], stream: Stream | None) -> dict[str, float]:
        """Density of every view; statistics for it come from the dense model."""
        return DenseModel(
            self.model,
            self.axes,
            units,
            stream,
            self.source,
            self.batches,
            self.loss,
            flat=self._flat_stats,
            score=lambda w, stats: _scores(self.axes.score, w, stats),
            solve=self._would_leave,
            compute=self.compute,
            seed=self.seed,
            progress=self.progress,
            costs={"bytes": partial(stored_bytes, self.model, self.axes.pattern), **self.costs},
        ).densities()

    def _would_leave(self, view: WeightView, w: Tensor, stats: dict[str, Tensor], density: float) -> Tensor:
        selector = Selector(self.axes.fitted(view), density)
        return self._solve(view, w, stats, self.axes.score, self.axes.recover, selector)[0]

    def _flat_stats(self, view: WeightView, stats: dict[str, Tensor]) -> dict[str, Tensor]:
        """Statistics of the whole view: vectors broadcast to its rows, matrices [G, I, I] where it has several groups."""
        rows = view.shape_OI[0] // view.groups
        flat = {
            name: value[0] if view.groups == 1 else value.repeat_interleave(rows, 0) if value.dim() == 2 else value
            for name, value in stats.items()
        }
        return {**flat, **self._whole.get(view.name, {}), **self._made(view)}

    def _made(self, view: WeightView) -> dict[str, Tensor]:
        """What is neither measured on the data nor a gradient."""
        made = {}
        if "random" in self.axes.needs:
            made["random"] = random_scores(view.shape_OI, self.seed, view.name)
        if "bias" in self.axes.needs:
            made["bias"] = view.bias()
        return made

    def _prune_unit(self, unit: Unit, collect: Collect | None) -> list[LayerResult]:
        if unit.name in self.done:
            if collect is not None and "drift" in self.layer_needs:
                # The dense activations pass on before the finished weights come in.
                collect(frozenset())
                self.source.load(unit.name, unit.module)
            return self.done[unit.name]
        steps = [unit.views] if collect is None or not self.axes.sequential else collect.steps()
        found = {}
        for views in steps:
            stats = collect(self.layer_needs | {"input"}, views) if collect is not None else {}
            found |= {view.name: self._prune_view(view, unit, stats.get(view.name)) for view in views}
        results = [found[view.name] for view in unit.views]
        if collect is not None and "hessian" in self.layer_needs:
            self._note_few_tokens(results, collect.tokens)
        if self.finished is not None:
            self.finished(unit, results)
        return results

    def _note_few_tokens(self, results: list[LayerResult], tokens: dict[str, int]) -> None:
        for result in results:
            seen, width = tokens.get(result.name, 0), result.shape[1]
            if 0 < seen < width:
                result.notes.append(f"{seen} calibration tokens for {width} inputs: the Hessian is singular")
                self._blurred.append(result.name)

    def _prune_view(self, view: WeightView, unit: Unit, stats: dict[str, Tensor] | None) -> LayerResult:
        start = time.perf_counter()
        axes, w = self.axes, view.read()
        selector = Selector(axes.fitted(view), self.densities[view.name], coding=axes.coding)
        if view.name in self.masks:
            selector = Given(selector.pattern, selector.density, coding=axes.coding, mask=self.masks[view.name])
        score, recover, method = axes.score, axes.recover, axes.name
        if stats is None and self.layer_needs - {"input"}:
            score, recover, method = registry.scorer.bind("magnitude"), registry.recovery.bind("none"), "magnitude"
            note = "the calibration data never reached this layer: pruned by magnitude"
            selector.note(note)
            self.notes.append(f"{view.name}: {note}")
        sample = None if stats is None else stats.get("input")
        try:
            new, mask = self._solve(view, w, stats or {}, score, recover, selector)
        except PumiceError as error:
            raise PumiceError(f"layer {view.name}: {error}") from error
        if not selector.pattern.verify(mask):
            raise PumiceError(
                f"recovery {recover.name!r} broke pattern {axes.pattern.text!r} on {view.name}: report this."
            )
        new, grid = _rounded(new, selector, stats or {})
        view.write(new)
        keep(view, grid)
        error = None if sample is None else _output_error(sample, w, new, view.groups)
        weight_error = float((w - new).norm() / w.norm().clamp(min=1e-30))
        o, i = view.shape_OI
        return LayerResult(
            view.name,
            unit.name,
            (o, i),
            int(torch.count_nonzero(new)) / max(new.numel(), 1),
            self.densities[view.name],
            error,
            weight_error,
            time.perf_counter() - start,
            method,
            selector.notes,
        )

    def _solve(
        self, view: WeightView, w: Tensor, stats: dict[str, Tensor], score: Bound, recover: Bound, selector: Selector
    ) -> tuple[Tensor, Tensor]:
        flat = self._flat_stats(view, stats)
        if self.axes.goal.name != "layer" and stats:
            w = _goal(self.axes.goal, view, w, stats)
        if view.groups == 1 or recover.name == "none":
            itself = self.axes.selects_itself and score is self.axes.score
            return recover(w, flat, None if itself else lambda weight: _scores(score, weight, flat), selector)
        # Each group of a convolution reads other inputs, so they are compensated one by one; but the pattern lies over
        # all of them (N:M, which decides inside a row, needs no look at the whole).
        local = selector.pattern.decides_locally
        mask = None if local else selector.whole(_scores(score, w, flat))
        whole = self._flat_stats(view, {})
        rows = w.shape[0] // view.groups
        parts = []
        for group in range(view.groups):
            part = slice(group * rows, (group + 1) * rows)
            own = {name: value[group] for name, value in stats.items()}
            own.update({name: value[part] for name, value in whole.items()})
            chosen = selector
            if mask is not None:
                chosen = Given(
                    selector.pattern, selector.density, selector.notes, selector.coding, selector.grids, mask[part]
                )
            itself = local and self.axes.selects_itself and score is self.axes.score
            parts.append(recover(w[part], own, None if itself else partial(_scores, score, stats=own), chosen))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _rounded(w: Tensor, selector: Selector, stats: Stats) -> tuple[Tensor, Grid | None]:
    """The layer on its grid and that grid: the recovery's own, else to the nearest after it; None for no integers."""
    if selector.coding is None:
        return w, None
    if selector.grids:
        return w, stacked(selector.grids)
    worth = stats.get("input_sqnorm")
    if worth is None and "hessian" in stats:
        worth = torch.diagonal(stats["hessian"], dim1=-2, dim2=-1)
    # Rows of several groups of a convolution read different inputs.
    grid = selector.coding.grid(w, worth[0] if worth is not None and worth.shape[0] == 1 else None)
    return grid.snap(w), grid


def _goal(goal: Bound, view: WeightView, w: Tensor, stats: Stats) -> Tensor:
    """The weights that the layer is to reproduce, group by group; `stats` with a leading axis G."""
    parts = w.unflatten(0, (view.groups, -1))
    return torch.cat(
        [goal(part, {name: value[group] for name, value in stats.items()}) for group, part in enumerate(parts)]
    )


def _scores(score: Bound, w: Tensor, stats: Stats) -> Tensor:
    """Scores [O, I]; a grouped convolution with one Hessian per group is scored group by group."""
    hessian = stats.get("hessian")
    if hessian is None or hessian.dim() == 2 or "hessian" not in score.info.needs:
        return score(w, stats)
    rows = w.shape[0] // len(hessian)
    parts = []
    for group in range(len(hessian)):
        part = slice(group * rows, (group + 1) * rows)
        own = {name: value[part] for name, value in stats.items() if value.dim() == 2}
        parts.append(score(w[part], {**own, "hessian": hessian[group]}))
    return torch.cat(parts)


def _output_error(x_GSI: Tensor, w: Tensor, new: Tensor, groups: int) -> float:
    rows = w.shape[0] // groups
    parts = [(x_GSI[g], slice(g * rows, (g + 1) * rows)) for g in range(groups)]
    wrong = sum(float((x @ (w[part] - new[part]).t()).square().sum()) for x, part in parts)
    right = sum(float((x @ w[part].t()).square().sum()) for x, part in parts)
    return (wrong / right) ** 0.5 if right > 0 else 0.0
