"""Plots as inline SVG that follows the page's colours, light or dark; matplotlib is optional."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pumice.analyze.record import Run
from pumice.analyze.summary import best_speed

HINT = "the plots need matplotlib: pip install 'pumice[report]'"
INK, FAINT = "#010203", "#040506"
"""Stand-ins for the page's text and line colours, which matplotlib cannot know; `inline` puts those in."""
COLOURS = ("#0f9488", "#d97706", "#6366f1", "#db2777", "#65a30d", "#0284c7", "#b45309", "#7c3aed")


@dataclass
class Plot:
    """One picture, with what it says in words for those who cannot see it."""

    title: str
    svg: str
    caption: str


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def layer_plots(run: Run) -> list[Plot]:
    """Density and output error of every pruned layer in the model's order, one line per kind of layer."""
    if not run.layers or not available():
        return []
    groups = by_kind(run.layers)
    place = "block" if all(_block(layer) is not None for layer in run.layers) else "position in the model"
    asked = run.prune.get("recipe", {}).get("density")
    plots = []
    figure, axes = canvas(3.0)
    for colour, (kind, layers) in zip(_cycle(len(groups)), groups.items(), strict=True):
        axes.plot(*_points(layers, "density"), label=kind, color=colour, marker="o", markersize=3, linewidth=1.2)
    if asked is not None:
        axes.axhline(asked, color=INK, linewidth=0.8, linestyle="--", label="asked")
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("density (share kept)")
    axes.set_xlabel(place)
    _legend(axes, len(groups) + 1)
    plots.append(Plot("Density of each layer", inline(figure, "density"), "Share of weights that are not zero."))
    errors = [layer for layer in run.layers if layer.get("error") is not None]
    key, label = ("error", "relative output error") if errors else ("weight_error", "relative weight error")
    figure, axes = canvas(3.0)
    for colour, (kind, layers) in zip(_cycle(len(groups)), groups.items(), strict=True):
        axes.plot(*_points(layers, key), label=kind, color=colour, marker="o", markersize=3, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(label)
    axes.set_xlabel(place)
    _legend(axes, len(groups))
    caption = "‖X(W−W′)ᵀ‖ / ‖XWᵀ‖ on calibration inputs." if errors else "‖W−W′‖ / ‖W‖; nothing was calibrated."
    return [*plots, Plot("Error of each layer", inline(figure, "error"), caption)]


def by_kind(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, Mapping[str, Any]]]]:
    """Layers grouped by what they are (`q_proj`, `down_proj`, …), each with the number of its block.

    Where a name has no number the position in the model stands for it; where there are more kinds than colours, all
    are one group.
    """
    groups: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    numbered = all(_block(layer) is not None for layer in layers)
    for position, layer in enumerate(layers):
        parts = [part for part in str(layer["name"]).split(".") if not part.isdigit()]
        kind = parts[-2] if len(parts) > 1 and parts[-1] == "weight" else parts[-1]
        block = _block(layer) if numbered else None
        groups.setdefault(kind, []).append((position if block is None else block, layer))
    if len(groups) > len(COLOURS):
        return {"layers": [item for items in groups.values() for item in items]}
    return groups


def _block(layer: Mapping[str, Any]) -> int | None:
    return next((int(part) for part in str(layer["name"]).split(".") if part.isdigit()), None)


def curve_points(runs: Sequence[Run], value: str) -> dict[str, list[tuple[float, float]]]:
    """Density against a measure: the sweep of each run, and the runs' own results as one line per method.

    `value`: perplexity, top1, disk_bytes, or decode and prefill, which become ratios to the run's dense.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        own = run.title or run.recipe.get("name", "sparse")
        scale = best_speed(run, value) if value in ("decode", "prefill") else 1.0
        points = [(point.density, getattr(point, value), point.series or own) for point in run.curve]
        for column in () if run.curve else run.sparses:
            measured = {speed.batch: speed for speed in column.speed}.get(1)
            found = getattr(measured, value, None) if value in ("decode", "prefill") else getattr(column, value)
            density = column.density if column.density is not None else run.prune.get("density")
            if density is not None:
                points.append((density, found, run.recipe.get("name") or own))
        for density, found, series in points:
            if found is not None and scale:
                lines.setdefault(series, []).append((density, found / scale))
    return {series: sorted(points) for series, points in lines.items()}


def curve_plots(runs: Sequence[Run]) -> list[Plot]:
    """Quality vs density and speed vs density, where there are at least two points to compare."""
    if not available():
        return []
    plots = []
    shown = (
        ("perplexity", "Quality against density", "perplexity (lower is better)", None),
        ("top1", "Agreement against density", "same next token as dense", 1.0),
        ("decode", "Decode speed against density", "times dense, batch 1", 1.0),
        ("prefill", "Prefill speed against density", "times dense, batch 1", 1.0),
    )
    for value, title, label, level in shown:
        lines = curve_points(runs, value)
        if sum(map(len, lines.values())) < 2:
            continue
        figure, axes = canvas(3.2, width=5.2)
        for colour, (name, points) in zip(_cycle(len(lines)), lines.items(), strict=True):
            axes.plot(*zip(*points, strict=True), label=name, color=colour, marker="o", markersize=4, linewidth=1.4)
        dense = level if level is not None else next((r.columns[0].perplexity for r in runs if r.columns), None)
        if dense is not None:
            axes.axhline(dense, color=INK, linewidth=0.8, linestyle="--", label="dense")
        values = [y for points in lines.values() for _, y in points]
        if value == "perplexity" and max(values) > 10 * min(values):
            axes.set_yscale("log")
        axes.set_xlabel("density (share of weights kept)")
        axes.set_ylabel(label)
        _legend(axes, len(lines) + 1)
        plots.append(Plot(title, inline(figure, value), "The dashed line is dense."))
    return plots


def _points(layers: Sequence[tuple[int, Mapping[str, Any]]], key: str) -> tuple[list[int], list[float]]:
    """Mean of a measure at each place: experts of one block share it."""
    found: dict[int, list[float]] = {}
    for place, layer in layers:
        if layer.get(key) is not None:
            found.setdefault(place, []).append(layer[key])
    places = sorted(found)
    return places, [sum(found[place]) / len(found[place]) for place in places]


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def canvas(height: float, width: float = 8.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, width=0.6)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(axes: Any, entries: int) -> None:
    if entries > 1:
        axes.legend(
            fontsize=8,
            frameon=False,
            labelcolor=INK,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=min(entries, 5),
        )


def inline(figure: Any, salt: str) -> str:
    """A figure as SVG to be put inside HTML: no prolog, no outside names, text as text, ids of its own."""
    import matplotlib

    buffer = io.StringIO()
    # One salt per plot: two inline pictures with the same ids would share their clip paths.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?)\swidth="([\d.]+)pt"([^>]*?)\sheight="[\d.]+pt"', r'\1 role="img"\3', svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[\d.]+pt"([^>]*?)\swidth="[\d.]+pt"', r'\1 role="img"\2', svg, count=1)
    for stand_in, colour in ((INK, "var(--ink)"), (FAINT, "var(--line)")):
        svg = svg.replace(stand_in, colour)
    # The page's own font is wanted, not the list of fonts that each text element names.
    svg = re.sub(r"font:\s*([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family:[^;\"]*;?\s*", "", svg)
    return svg.strip()
