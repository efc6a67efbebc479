"""Draw what `moe_compare.py` has measured: loss and speed, load over time, routing by kind of token, specialisation.

python benchmarks/moe_plots.py    # benchmarks/results/moe_compare_*.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))
import moe_rows
import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
SHOWN = ("mixtral", "switch-transformer", "deepseek-v3", "grin-moe", "remoe", "hash", "x-moe", "autonomy-of-experts")
"""Rows whose experts are shown one by one."""
DPI = 90


def losses(rows: dict[str, moe_rows.Fared]) -> Figure:
    """Loss against speed of training: every row a dot, its name beside it where it is among the best or dense."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    fair = [row for row in rows.values() if row.causal]
    named = (
        {row.name for row in fair[:10]}
        | {moe_rows.DENSE, moe_rows.LARGE, *moe_rows.BASES}
        | {r.name for r in fair[-4:]}
    )
    for row in rows.values():
        colour = "#d97706" if "recipe" not in row.entry else "#0f9488" if row.causal else "#9ca3af"
        axes.plot([row.mean["speed"]] * len(row.losses), row.losses, color=colour, linewidth=0.8, alpha=0.5)
        axes.plot(row.mean["speed"], row.loss, "o", color=colour, markersize=4)
        if row.name in named:
            place = (row.mean["speed"], row.loss)
            axes.annotate(row.name, place, xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set(
        xscale="log", xlabel="speed of training, dense of equal active parameters = 1", ylabel="loss, nats a token"
    )
    axes.set_title("Grey rows see the future; lines span the seeds", fontsize=9)
    return figure


def load_over_time(drawn: dict[str, Any]) -> Figure:
    """Each expert's share of the last block's assignments while it is trained."""
    from matplotlib.figure import Figure

    names = [name for name in SHOWN if drawn.get(name, {}).get("load")]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    grid = figure.subplots(2, 4, sharey=True)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(grid.flat, names, strict=False):
        table_P = np.array(drawn[name]["load"])
        axes.stackplot(table_P[:, 0], table_P[:, 1:].T, linewidth=0.3, edgecolor="white")
        axes.set_title(name, fontsize=9)
        axes.set(xlim=(0, table_P[-1, 0]), ylim=(0, 1), xlabel="step")
    return figure


def by_kind(drawn: dict[str, Any], rows: dict[str, moe_rows.Fared]) -> Figure:
    """How much more often than others a kind of token goes to an expert of the last block."""
    from matplotlib.figure import Figure

    names = [name for name in SHOWN if drawn.get(name, {}).get("by_kind") and name in rows]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    grid, image = figure.subplots(2, 4), None
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(grid.flat, names, strict=False):
        present = {kind: counts for kind, counts in drawn[name]["by_kind"].items() if sum(counts)}
        count_NE = np.array(list(present.values()), dtype=float)
        share_NE = count_NE / count_NE.sum(1, keepdims=True)
        usual_E = count_NE.sum(0) / count_NE.sum()
        lift_NE = np.log2(np.clip(share_NE / np.maximum(usual_E, 1e-9), 1 / 8, 8))
        image = axes.imshow(lift_NE, aspect="auto", cmap="RdBu_r", vmin=-3, vmax=3)
        axes.set_yticks(range(len(present)), list(present), fontsize=7)
        axes.set_title(f"{name}: {rows[name].mean['specialisation']:.2f}", fontsize=9)
        axes.set_xlabel("expert")
    if image is not None:
        figure.colorbar(image, ax=list(grid.flat), label="times the usual share, log2", shrink=0.8)
    figure.suptitle("Kinds of tokens by expert; the number is the specialisation", fontsize=9)
    return figure


def specialisation(rows: dict[str, moe_rows.Fared]) -> Figure:
    """Mutual information of kind and expert over the entropy of the kinds, the mean over blocks, of every row."""
    from matplotlib.figure import Figure

    found = sorted(
        (row for row in rows.values() if "specialisation" in row.mean), key=lambda row: row.mean["specialisation"]
    )
    figure = Figure(figsize=(7, 0.16 * len(found) + 1), layout="constrained")
    axes = figure.subplots()
    values = [row.mean["specialisation"] for row in found]
    axes.barh(range(len(found)), values, color=["#0f9488" if row.causal else "#9ca3af" for row in found])
    axes.set_yticks(range(len(found)), [row.name for row in found], fontsize=6)
    axes.set_xlabel("specialisation: share of a token's kind that its experts tell")
    axes.margins(y=0.005)
    return figure


def main() -> None:
    rows = moe_rows.fared(json.loads((RESULTS / "moe_compare.json").read_text()))
    drawn = json.loads((RESULTS / "moe_compare_loads.json").read_text())
    pictures = {
        "loss": losses(rows),
        "load": load_over_time(drawn),
        "kinds": by_kind(drawn, rows),
        "specialisation": specialisation(rows),
    }
    for name, figure in pictures.items():
        figure.savefig(RESULTS / f"moe_compare_{name}.png", dpi=DPI)


if __name__ == "__main__":
    main()
