"""Choose by measuring how each layer runs here: dense against every layout that fits it, weights cold."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core import dispatch, registry
from pumice.core.dispatch import Call
from pumice.core.errors import PumiceError
from pumice.core.progress import bar
from pumice.core.view import WeightView, module_views
from pumice.weights.layouts.base import Packed
from pumice.weights.layouts.base import pack as pack_as
from pumice.weights.layouts.base import unpack as unpack_matrix
from pumice.weights.modules import SparseLinear, SparseModule, densify, reads_weight, replace_module, sparse_twin

MANY_ROWS = 256
"""Rows at which the backend for long prompts is chosen, whatever batches were asked for."""
COLD_BYTES = 128 << 20
"""Copies of a layer are rotated through this much memory, if the model's own layers are as large together."""
MAX_COPIES = 512
MARGIN = 1.03
"""A sparse layout must beat dense by 3 %, or measuring noise would decide."""
SECONDS_PER_MEASUREMENT = 0.02
REPEATS = 5


@dataclass
class Timing:
    """One way to run one layer at one batch size: milliseconds, or the reason why it was not run."""

    layout: str
    backend: str
    rows: int
    ms: float | None = None
    reason: str | None = None


@dataclass
class LayerChoice:
    """What runs for one layer and why."""

    name: str
    shape: tuple[int, int]
    density: float
    layout: str
    params: dict[str, int]
    backends: dict[int, str]
    """Rows -> backend."""
    ms: dict[int, float]
    dense_ms: dict[int, float]
    """Rows -> milliseconds of the best dense backend in the same run."""
    bytes: int
    dense_bytes: int
    reason: str
    timings: list[Timing] = field(default_factory=list)


@dataclass
class Description:
    """How a model is stored and run, layer by layer."""

    layers: list[LayerChoice]
    batch: tuple[int, ...] = ()
    threads: int = 0

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def copies(self) -> int:
        """Bytes that backends keep beside the weights themselves (oneDNN's reordered dense ones)."""
        return sum(layer.bytes - layer.dense_bytes for layer in self.layers if layer.layout == "dense")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes, "dense_bytes": self.dense_bytes}


def pack(
    model: nn.Module, *, batch: int | Sequence[int] = (1,), values: str | None = None, progress: bool = True
) -> nn.Module:
    """Swap each linear layer for the fastest way to run it here, in place; returns the model.

    Every layout that fits a layer's zeros is timed against the best dense backend on this machine, with the caller's
    thread count and weights out of cache, at the given batch sizes (rows: sequences × tokens of one forward pass).
    The layout with the best geometric mean wins, dense unless it is beaten by 3 %. `describe` tells what was chosen.

    Args:
        batch: rows to optimise for, e.g. 1 for decoding one sequence.
        values: "bfloat16", "float16" or "float32" to change the model's type first; None keeps it.

    Raises:
        PumiceError: a batch size below 1, or an unknown type of values.
    """
    rows = sorted({batch} if isinstance(batch, int) else set(batch))
    if not rows or any(not isinstance(size, int) or size < 1 for size in rows):
        raise PumiceError(f"batch={batch!r} must hold whole numbers of at least 1.")
    if values is not None:
        if values not in ("bfloat16", "float16", "float32"):
            raise PumiceError(f"values={values!r} must be bfloat16, float16 or float32 (or None to keep the type).")
        model = model.to(getattr(torch, values))
    jobs = list(_packable(model))
    budget = min(COLD_BYTES, sum(packed.dense_nbytes for _, _, packed in jobs))
    measured: dict[Any, _Verdict] = {}
    choices: list[LayerChoice] = []
    with bar(len(jobs), "pack", enabled=progress, unit="layer") as shown, torch.no_grad():
        for name, module, packed in jobs:
            key = _signature(packed)
            if key not in measured:
                measured[key] = _measure(packed, rows, budget)
            choice, new = _apply(name, module, packed, measured[key], rows)
            choices.append(choice)
            if new is not module:
                model = replace_module(model, name, new)
            shown.update()
    choices += _kept(model)
    model.__dict__["_pumice_description"] = Description(choices, tuple(rows), torch.get_num_threads())
    return model


def unpack(model: nn.Module) -> nn.Module:
    """Every sparse layer as an ordinary dense one again, zeros written out, in place; returns the model."""
    model.__dict__.pop("_pumice_description", None)
    return densify(model)


def describe(model: nn.Module) -> Description:
    """How each layer of a model is stored and run; with timings and reasons after `pack`."""
    stored = model.__dict__.get("_pumice_description")
    return stored if stored is not None else Description([_state(*item) for item in _packable(model)] + _kept(model))


def _packable(model: nn.Module) -> Iterator[tuple[str, nn.Module, Packed]]:
    """Linear layers (sparse already or dense) whose weight is not shared with anything else."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            yield name, module, module.packed
        elif sparse_twin(module) is SparseLinear and owners[id(module.weight)] == 1 and not reads_weight(model, name):
            (view,) = module_views(name, module)
            w = view.matrix()
            if w.dtype in (torch.bfloat16, torch.float16, torch.float32) and not w.is_meta:
                yield name, module, pack_as(w.contiguous(), "dense")


def _kept(model: nn.Module) -> list[LayerChoice]:
    """Weights that stay dense in memory because no sparse kernel runs their kind of layer."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, SparseModule):
            continue
        reason = "no sparse kernel runs this kind of layer"
        if sparse_twin(module) is SparseLinear:
            if not reads_weight(model, name):
                continue
            reason = "the model's own code reads this weight at every call"
        for view in module_views(name, module):
            found.append(_dense_choice(view, reason))
    return found


def _dense_choice(view: WeightView, reason: str) -> LayerChoice:
    w = view.matrix()
    density = 1.0 if w.is_meta else float((w != 0).float().mean())
    size = w.numel() * w.element_size()
    return LayerChoice(view.name, view.shape_OI, density, "dense", {}, {}, {}, {}, size, size, reason)


def _state(name: str, module: nn.Module, packed: Packed) -> LayerChoice:
    density = _density(packed)
    reason = "as stored; not measured on this machine yet" if isinstance(module, SparseLinear) else "an ordinary layer"
    return LayerChoice(
        name,
        packed.shape,
        density,
        packed.layout,
        packed.params,
        {},
        {},
        {},
        packed.nbytes,
        packed.dense_nbytes,
        reason,
    )


def _density(packed: Packed) -> float:
    values = packed.tensors[packed.value_name]
    return float((values != 0).sum()) / max(1, packed.shape[0] * packed.shape[1])


def _signature(packed: Packed) -> Any:
    """Layers that may share one measurement."""
    kind = tuple(sorted(packed.params.items()))
    return packed.shape, packed.dtype, packed.layout, kind, round(_density(packed) * 40)


@dataclass
class _Verdict:
    """The outcome of one measurement."""

    layout: str
    params: dict[str, int]
    backends: dict[int, str]
    timings: list[Timing]
    best_dense: dict[int, Timing]
    reason: str

    def ms(self, rows: int) -> float:
        return next(
            t.ms
            for t in self.timings
            if (t.layout, t.backend, t.rows) == (self.layout, self.backends[rows], rows) and t.ms
        )


def _layouts(packed: Packed) -> list[Packed]:
    """The matrix in every layout that fits its zeros and is smaller than dense."""
    w = unpack_matrix(packed)
    found = [pack_as(w, "dense")]
    for info in registry.layout.members():
        if info.name == "dense":
            continue
        tried = [packed.params] if packed.layout == info.name else info.obj.candidates(w)
        for params in tried:
            smaller = info.obj.refuse(w, **params) is None and info.obj.stored_bytes(w, **params) < found[0].nbytes
            if smaller:
                found.append(pack_as(w, info.name, **params))
    return found


def _measure(packed: Packed, batch: Sequence[int], budget: int) -> _Verdict:
    """Time every layout and backend, dense in turns with them, and judge."""
    points = sorted({*batch, MANY_ROWS})
    timings: list[Timing] = []
    candidates = _layouts(packed)
    for rows in points:
        runs: list[tuple[Timing, Callable[[], None]]] = []
        x = torch.randn(rows, packed.shape[1]).to(packed.dtype)
        for candidate in candidates:
            call = Call("linear", candidate.layout, candidate.dtype, "cpu", rows, candidate.shape, candidate.params)
            for backend, reason in dispatch.candidates(call):
                timing = Timing(candidate.layout, backend.name, rows, reason=reason)
                timings.append(timing)
                if reason is None:
                    runs.append((timing, _rotation(candidate, backend, x, budget)))
        _time_in_turns(runs)
    return _judge(candidates, timings, batch, points)


def _rotation(packed: Packed, backend: dispatch.Backend, x: Tensor, budget: int) -> Callable[[], None]:
    """A call that takes another copy of the layer each time, so that its weights come from memory."""
    # As many copies as the dense model has layers of this size: what the real model rotates through.
    copies = max(1, min(budget // max(packed.dense_nbytes, 1), MAX_COPIES))
    runs = [backend.prepare(copy.deepcopy(packed) if i else packed, None) for i in range(copies)]
    state = {"next": 0}

    def run() -> None:
        state["next"] = (state["next"] + 1) % len(runs)
        runs[state["next"]](x)

    return run


def _time_in_turns(runs: list[tuple[Timing, Callable[[], None]]]) -> None:
    counts = []
    for _, run in runs:
        run()
        start = time.perf_counter()
        run()
        once = time.perf_counter() - start
        counts.append(max(1, min(200, int(SECONDS_PER_MEASUREMENT / REPEATS / max(once, 1e-7)))))
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(REPEATS):
        for index, (_, run) in enumerate(runs):
            start = time.perf_counter()
            for _ in range(counts[index]):
                run()
            samples[index].append((time.perf_counter() - start) / counts[index])
    for (timing, _), values in zip(runs, samples, strict=True):
        timing.ms = statistics.median(values) * 1e3


def _judge(candidates: list[Packed], timings: list[Timing], batch: Sequence[int], points: Sequence[int]) -> _Verdict:
    def best(layout: str, rows: int) -> Timing | None:
        ran = [t for t in timings if t.layout == layout and t.rows == rows and t.ms is not None]
        return min(ran, key=lambda t: t.ms or math.inf) if ran else None

    dense = {rows: timing for rows in points if (timing := best("dense", rows)) is not None}
    scores: dict[int, float] = {}
    for index, candidate in enumerate(candidates):
        found = [best(candidate.layout, rows) for rows in batch]
        if all(timing is not None for timing in found):
            logs = [math.log((dense[t.rows].ms or 1) / (t.ms or 1)) for t in found if t is not None]
            scores[index] = math.exp(sum(logs) / len(logs))
    sparse = {index: score for index, score in scores.items() if candidates[index].layout != "dense"}
    winner = max(sparse, key=lambda index: sparse[index], default=0)
    if not sparse or sparse[winner] < MARGIN:
        winner = 0
    reason = _reason(candidates, scores, winner, batch)
    chosen = candidates[winner]
    backends = {rows: timing.backend for rows in points if (timing := best(chosen.layout, rows)) is not None}
    return _Verdict(chosen.layout, chosen.params, backends, timings, dense, reason)


def _reason(candidates: list[Packed], scores: dict[int, float], winner: int, batch: Sequence[int]) -> str:
    at = "/".join(map(str, batch))
    if len(candidates) == 1:
        return "dense: the weight has no zeros that any layout could leave out"
    others = ", ".join(f"{candidates[i].layout} {score:.2f}x" for i, score in scores.items() if i not in (0, winner))
    if winner == 0:
        return f"dense is fastest at {at} rows ({others} of its speed)"
    beaten = f"; {others}" if others else ""
    return f"{candidates[winner].layout} is {scores[winner]:.2f}x as fast as the best dense at {at} rows{beaten}"


def _apply(
    name: str, module: nn.Module, packed: Packed, verdict: _Verdict, batch: Sequence[int]
) -> tuple[LayerChoice, nn.Module]:
    """The layer as the verdict wants it, and the record of it."""
    plain = verdict.layout == "dense" and set(verdict.backends.values()) == {"torch"}
    if plain:
        new = module.to_dense() if isinstance(module, SparseModule) else module
        stored = packed.dense_nbytes
    else:
        target = packed
        if (packed.layout, packed.params) != (verdict.layout, verdict.params):
            target = pack_as(unpack_matrix(packed), verdict.layout, **verdict.params)
        if isinstance(module, SparseLinear):
            new = module if target is packed else SparseLinear(target, module.bias, transposed=module.transposed)
        else:
            new = SparseLinear.from_module(module, target)
        new.set_backends(_plan(target, verdict.backends))
        # oneDNN keeps its own reordered copy beside the weight.
        stored = target.nbytes + (target.dense_nbytes if "onednn" in verdict.backends.values() else 0)
    choice = LayerChoice(
        name,
        packed.shape,
        _density(packed),
        verdict.layout,
        verdict.params,
        {rows: verdict.backends[rows] for rows in batch},
        {rows: verdict.ms(rows) for rows in batch},
        {rows: verdict.best_dense[rows].ms or 0.0 for rows in batch},
        stored,
        packed.dense_nbytes,
        verdict.reason,
        verdict.timings,
    )
    return choice, new


def _plan(packed: Packed, backends: dict[int, str]) -> list[tuple[int | None, str]]:
    """Backends for all row counts: between two measured ones the border is their geometric mean, or where one refuses."""
    plan: list[tuple[int | None, str]] = []
    points = sorted(backends)
    for here, after in zip(points, [*points[1:], None], strict=True):
        name = backends[here]
        if after is None:
            plan.append((None, name))
        elif backends[after] != name:
            backend = dispatch.get("linear", packed.layout, name)
            limit = math.isqrt(here * after)
            while limit > here and backend.refuse(
                Call("linear", packed.layout, packed.dtype, "cpu", limit, packed.shape, packed.params)
            ):
                limit -= 1
            plan.append((limit, name))
    return plan
