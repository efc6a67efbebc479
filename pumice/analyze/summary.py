"""The summary table: dense beside sparse, and plainly who is ahead in each row. HTML and terminal show the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pumice.analyze.record import Column, Run

EQUAL = 0.01
"""Relative difference below which nobody is ahead: medians repeat no better than this."""


@dataclass
class Cell:
    """One number as text, what it is against dense as text, and who is ahead: "sparse", "dense", "equal" or ""."""

    text: str
    against: str = ""
    ahead: str = ""


@dataclass
class Row:
    """One measure over all columns."""

    group: str
    label: str
    cells: list[Cell]


@dataclass
class Table:
    """The whole summary."""

    columns: list[str]
    rows: list[Row]
    merged: bool = False
    """Whether one dense column stands for several runs with times of their own."""
    several_denses: bool = False
    """Whether a run has several dense columns; sparse is compared with the best of them, row by row."""

    @property
    def dense_wins(self) -> list[tuple[str, str]]:
        """(column, measure) of every comparison that dense wins."""
        return [
            (self.columns[i], row.label)
            for row in self.rows
            for i, cell in enumerate(row.cells)
            if cell.ahead == "dense"
        ]


@dataclass(frozen=True)
class _Measure:
    group: str
    label: str
    read: Callable[[Column], float | None]
    show: Callable[[float], str]
    better: int
    """+1 where more is better, −1 where less is, 0 where the number is no contest (agreement with dense itself)."""


def size_text(count: float) -> str:
    """Bytes in the largest decimal unit that keeps a digit before the point: 98,200,000 as "98.2 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"


def number(value: float) -> str:
    """Three significant digits, thousands separated, no exponent below a billion."""
    if abs(value) >= 1e9:
        return f"{value:.2e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _measures(columns: Sequence[Column]) -> list[_Measure]:
    """The rows that any column has a number for."""
    lengths = sorted({column.seqlen for column in columns if column.seqlen})
    tokens = f" ({'/'.join(map(str, lengths))}-token windows)" if lengths else ""
    found = [
        _Measure("Quality", f"Perplexity{tokens}", lambda c: c.perplexity, lambda v: f"{v:,.2f}", -1),
        _Measure("Quality", "Same next token as dense", lambda c: c.top1, percent, 0),
        _Measure("Quality", "KL from dense, nats", lambda c: c.kl, lambda v: f"{v:.3f}", 0),
        _Measure("Quality", "Cosine with dense embeddings", lambda c: c.cosine, lambda v: f"{v:.3f}", 0),
        _Measure("Quality", "Top-1 accuracy", lambda c: c.accuracy, percent, 1),
        _Measure("Quality", "Retrieval nDCG@10", lambda c: c.retrieval, lambda v: f"{v:.3f}", 1),
    ]
    for task in sorted({name for column in columns for name in column.tasks}):
        found.append(_Measure("Quality", f"{task} accuracy", _task(task), percent, 1))
    found.append(_Measure("Size", "On disk", lambda c: c.disk_bytes, size_text, -1))
    found.append(_Measure("Size", "In memory", lambda c: c.memory_bytes, size_text, -1))
    for batch in sorted({speed.batch for column in columns for speed in column.speed}):
        for kind, unit in (("prefill", "tokens/s"), ("decode", "tokens/s"), ("forward", "examples/s")):
            label = f"{kind.capitalize()}, batch {batch}, {unit}"
            found.append(_Measure("Speed", label, _speed(batch, kind), number, 1))
    return [measure for measure in found if any(measure.read(column) is not None for column in columns)]


def _task(name: str) -> Callable[[Column], float | None]:
    def read(column: Column) -> float | None:
        scores = column.tasks.get(name, {})
        value = scores.get("acc_norm", scores.get("acc"))
        return None if value is None else float(value)

    return read


def _speed(batch: int, kind: str) -> Callable[[Column], float | None]:
    return lambda column: next((getattr(speed, kind) for speed in column.speed if speed.batch == batch), None)


def _best(measure: _Measure, denses: Sequence[Column]) -> float | None:
    values = [value for value in map(measure.read, denses) if value is not None]
    return (max if measure.better > 0 else min)(values, default=None)


def _cell(measure: _Measure, column: Column, denses: Sequence[Column]) -> Cell:
    """A sparse column against the best that dense does in this measure; dense columns are not judged."""
    value = measure.read(column)
    if value is None:
        return Cell("–")
    text = measure.show(value)
    theirs = _best(measure, denses)
    if any(column is one for one in denses) or measure.better == 0 or not theirs:
        return Cell(text)
    ratio = value / theirs
    if abs(ratio - 1) <= EQUAL:
        return Cell(text, "as dense", "equal")
    ahead = "sparse" if (ratio > 1) == (measure.better > 0) else "dense"
    if measure.group == "Speed":
        return Cell(text, f"{ratio:.2f}×", ahead)
    if measure.show is percent:
        return Cell(text, f"{100 * (value - theirs):+.1f} points", ahead)
    return Cell(text, f"{100 * (ratio - 1):+,.0f} %" if abs(ratio - 1) >= 0.1 else f"{100 * (ratio - 1):+.1f} %", ahead)


def summarise(runs: Sequence[Run]) -> Table:
    """Columns of all runs beside each other.

    Dense columns that differ in nothing but the clock are shown once, with the times of the first; each sparse column
    is still compared with the dense times of its own run.
    """
    columns: list[tuple[Column, Run]] = []
    names: list[str] = []
    seen: dict[Any, Column] = {}
    merged = False
    several_models = len({run.model.get("name") for run in runs}) > 1
    for run in runs:
        for column in run.columns:
            if column in run.denses:
                key = (run.model.get("name"), repr(replace(column, speed=[], notes=[])))
                first = seen.setdefault(key, column)
                if first is not column:
                    merged = merged or first.speed != column.speed
                    continue
                names.append(f"{run.model.get('name', '')} {column.name}" if several_models else column.name)
            else:
                names.append(f"{run.title}: {column.name}" if len(runs) > 1 and run.title else column.name)
            columns.append((column, run))
    rows = [
        Row(measure.group, measure.label, [_cell(measure, column, run.denses) for column, run in columns])
        for measure in _measures([column for column, _ in columns])
    ]
    after = max((i + 1 for i, row in enumerate(rows) if row.group == "Size"), default=len(rows))
    rows[after:after] = _input_files(runs, [run for _, run in columns])
    return Table(names, rows, merged, any(len(run.denses) > 1 for run in runs))


def _input_files(runs: Sequence[Run], owners: Sequence[Run]) -> list[Row]:
    """The file that was pruned, under the dense column: a 4-bit file may be smaller than anything made of it."""
    found = []
    for run in runs:
        size = run.model.get("input_bytes")
        if size is None or run.model.get("input_format") != "GGUF":
            continue
        first = owners.index(run) if run in owners else 0
        cells = [Cell(size_text(size) if i == first else "–") for i in range(len(owners))]
        found.append(Row("Size", f"Input file ({run.model['input_format']})", cells))
    return found


def verdict(run: Run) -> str:
    """One sentence on what the run cost and gave, dense's wins included; empty without a dense and a sparse column."""
    if not run.denses or not run.sparses:
        return ""
    dense, sparse = run.denses[0], run.sparses[-1]
    parts = []
    if dense.perplexity and sparse.perplexity:
        parts.append(f"perplexity goes from {dense.perplexity:,.2f} to {sparse.perplexity:,.2f}")
    if dense.disk_bytes and sparse.disk_bytes:
        parts.append(f"{_change(sparse.disk_bytes / dense.disk_bytes, 'smaller', 'larger')} on disk")
    for kind in ("decode", "prefill", "forward"):
        ours, theirs = _speed(1, kind)(sparse), best_speed(run, kind)
        if ours and theirs:
            ratio, loaded = ours / theirs, _speed(1, kind)(dense)
            how = "as fast as dense" if abs(ratio - 1) <= EQUAL else f"at {ratio:.2f}× the speed of dense"
            if loaded and loaded < theirs / (1 + EQUAL):
                how += f" packed by Pumice, {ours / loaded:.2f}× that of dense as loaded"
            parts.append(f"{kind} {how}")
    if not parts:
        return ""
    kept = run.prune.get("density")
    head = f"{percent(kept)} of the weights of the pruned layers kept: " if kept is not None else ""
    text = head + ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def best_speed(run: Run, kind: str, batch: int = 1) -> float | None:
    """The fastest that any dense column of a run is."""
    found = [speed for speed in map(_speed(batch, kind), run.denses) if speed is not None]
    return max(found, default=None)


def _change(ratio: float, less: str, more: str) -> str:
    if abs(ratio - 1) < 0.005:
        return "as large"
    return f"{100 * abs(1 - ratio):.0f} % {less if ratio < 1 else more}"


def packed_groups(packed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers of `pumice.describe` grouped by shape, layout and backend, with the times summed where measured."""
    groups: dict[Any, dict[str, Any]] = {}
    for layer in packed:
        backends = {str(rows): name for rows, name in layer.get("backends", {}).items()}
        key = (tuple(layer["shape"]), layer["layout"], tuple(sorted(backends.items())))
        group = groups.setdefault(
            key,
            {
                "shape": layer["shape"],
                "layout": layer["layout"],
                "backends": backends,
                "layers": [],
                "density": 0.0,
                "ms": dict.fromkeys(backends, 0.0),
                "dense_ms": dict.fromkeys(backends, 0.0),
                "reason": layer.get("reason", ""),
            },
        )
        group["layers"].append(layer["name"])
        group["density"] += layer["density"]
        for kind in ("ms", "dense_ms"):
            for rows, value in layer.get(kind, {}).items():
                group[kind][str(rows)] = group[kind].get(str(rows), 0.0) + value
    for group in groups.values():
        group["density"] /= len(group["layers"])
    return list(groups.values())
