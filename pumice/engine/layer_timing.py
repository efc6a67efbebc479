"""Time one layer in every layout and backend that can run it, dense in turns with them, and judge."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pumice.core import dispatch, registry
from pumice.core.dispatch import Call
from pumice.weights.layouts.base import Packed, grid_of, possible, repack
from pumice.weights.layouts.base import pack as pack_as
from pumice.weights.layouts.base import unpack as unpack_matrix

MANY_ROWS = 256
"""Rows at which the backend for long prompts is chosen, whatever batches were asked for: without copies then."""
MAX_COPIES = 512
MARGIN = 1.03
"""A sparse layout must beat dense by 3 %, or measuring noise would decide."""
TIE = 1.05
"""Sparse layouts whose times differ by less count as equally fast."""
SECONDS, TURN, TURNS = 0.03, 0.001, (7, 25)
"""How long each way is timed, about, how long one turn of it takes, and how many turns there are at least and at most: short ones,
since what else runs on a machine comes and goes within tens of milliseconds."""
HOPELESS = 8
"""A way that took so many times as long as the fastest at its first calls is not timed again."""


@dataclass
class Timing:
    """One way to run one layer at one batch size: milliseconds, or the reason why it was not run."""

    layout: str
    backend: str
    rows: int
    ms: float | None = None
    reason: str | None = None
    params: dict[str, int] = field(default_factory=dict)
    """Of the layout: one matrix may fit several N:M or several block sizes."""


@dataclass
class Verdict:
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
            if (t.layout, t.params, t.backend, t.rows) == (self.layout, self.params, self.backends[rows], rows) and t.ms
        )


def _ways(call: Call) -> list[tuple[dispatch.Backend, str | None]]:
    """Backends and the reasons why they would not run; a form for memory only is not there to be unpacked."""
    found = dispatch.candidates(call)
    if registry.layout.get(call.layout).extras["storable"]:
        return found
    return [(backend, reason) for backend, reason in found if backend.name != "unpack"]


def _call(packed: Packed, rows: int, activations: str | None) -> Call:
    return Call("linear", packed.layout, packed.dtype, "cpu", rows, packed.shape, packed.params, activations)


def _layouts(packed: Packed) -> list[Packed]:
    """The matrix dense, as it is stored, and in every layout that fits its zeros (and its grid) and is smaller than dense."""
    w, grid = unpack_matrix(packed), grid_of(packed)
    found = [pack_as(w, "dense")]
    own = [] if packed.layout == "dense" else [packed]
    for name, params, size in possible(w, grid, memory=True):
        call = Call("linear", name, packed.dtype, "cpu", 1, packed.shape, params)
        runs = any(reason is None for _, reason in _ways(call))
        if runs and name not in ("dense", packed.layout) and size < found[0].nbytes:
            own.append(repack(packed, name, **params))
    return found + own


def measure(packed: Packed, batch: Sequence[int], budget: int, activations: str | None = None) -> Verdict:
    """Time every layout and backend, dense in turns with them, and judge. `activations`: what x may be rounded to."""
    points = sorted({*batch, MANY_ROWS})
    timings: list[Timing] = []
    candidates = _layouts(packed)
    for rows in points:
        runs: list[tuple[Timing, Callable[[], None]]] = []
        x = torch.randn(rows, packed.shape[1]).to(packed.dtype)
        for candidate in candidates:
            for backend, reason in _ways(_call(candidate, rows, activations)):
                timing = Timing(candidate.layout, backend.name, rows, None, reason, dict(candidate.params))
                timings.append(timing)
                if reason is None:
                    runs.append((timing, _rotation(candidate, backend, x, budget)))
        time_in_turns(runs)
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


def time_in_turns(runs: list[tuple[Timing, Callable[[], None]]]) -> None:
    """Note the median time of each way, those that could be the fastest in turns with each other."""
    firsts = []
    for timing, run in runs:
        run()
        once = _seconds(run, 1)
        # A short call that something came between looks hopeless.
        once = once if once > SECONDS else min(once, _seconds(run, 1), _seconds(run, 1))
        timing.ms = once * 1e3
        firsts.append(once)
    limit = HOPELESS * min(firsts, default=0.0)
    raced = [
        (timing, run, max(1, int(TURN / max(once, 1e-7))))
        for (timing, run), once in zip(runs, firsts, strict=True)
        if once <= limit
    ]
    longest = max((once for once in firsts if once <= limit), default=TURN)
    turns = max(TURNS[0], min(TURNS[1], int(SECONDS / max(TURN, longest))))
    samples = [[_seconds(run, count) for _, run, count in raced] for _ in range(turns)]
    for index, (timing, _, _) in enumerate(raced):
        timing.ms = statistics.median(turn[index] for turn in samples) * 1e3


def _seconds(run: Callable[[], None], count: int) -> float:
    """The mean of so many calls."""
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def _judge(candidates: list[Packed], timings: list[Timing], batch: Sequence[int], points: Sequence[int]) -> Verdict:
    def ran(packed: Packed, rows: int) -> list[Timing]:
        wanted = (packed.layout, packed.params, rows)
        return [t for t in timings if (t.layout, t.params, t.rows) == wanted and t.ms is not None]

    def best(packed: Packed, rows: int) -> Timing | None:
        return min(ran(packed, rows), key=lambda t: t.ms or math.inf, default=None)

    dense = {rows: timing for rows in points if (timing := best(candidates[0], rows)) is not None}
    scores: dict[int, float] = {}
    for index, candidate in enumerate(candidates):
        found = [best(candidate, rows) for rows in batch]
        if all(timing is not None for timing in found):
            logs = [math.log((dense[t.rows].ms or 1) / (t.ms or 1)) for t in found if t is not None]
            scores[index] = math.exp(sum(logs) / len(logs))
    sparse = {index: score for index, score in scores.items() if candidates[index].layout != "dense"}
    winner = max(sparse, key=lambda index: sparse[index], default=0)
    if not sparse or sparse[winner] < MARGIN:
        winner = 0
    else:
        # Of what is as fast, the smallest: the clock is not that exact, and where calls are few bytes are what counts.
        level = [index for index, score in sparse.items() if score >= max(sparse[winner] / TIE, MARGIN)]
        winner = min(level, key=lambda index: candidates[index].nbytes)
    reason = _reason(candidates, scores, winner, batch)
    chosen = candidates[winner]
    backends = {rows: timing.backend for rows in batch if (timing := best(chosen, rows)) is not None}
    # What is kept beside the weights is for rows that were asked for; others get by with that, or without.
    kept = {dispatch.get("linear", chosen.layout, name).extra for name in backends.values()}
    for rows in set(points) - set(batch):
        found = [(t, dispatch.get("linear", chosen.layout, t.backend).extra) for t in ran(chosen, rows)]
        light = [t for t, extra in found if extra in kept or not extra(chosen)] or [t for t, _ in found]
        if light:
            backends[rows] = min(light, key=lambda t: t.ms or math.inf).backend
    return Verdict(chosen.layout, chosen.params, dict(sorted(backends.items())), timings, dense, reason)


def _reason(candidates: list[Packed], scores: dict[int, float], winner: int, batch: Sequence[int]) -> str:
    at = "/".join(map(str, batch))
    if len(candidates) == 1:
        return "dense: the weight has no zeros that any layout could leave out"
    others = ", ".join(f"{candidates[i].layout} {score:.2f}x" for i, score in scores.items() if i not in (0, winner))
    if winner == 0:
        return f"dense is fastest at {at} rows ({others} of its speed)"
    beaten = f"; {others}" if others else ""
    return f"{candidates[winner].layout} is {scores[winner]:.2f}x as fast as the best dense at {at} rows{beaten}"
