"""Which methods have not earned their keep: no measured row of them is better than the nearest simpler method's.

What the nearest simpler method is, a method says itself where it is registered (`simpler=…`), or its family does:
magnitude for scores, no recovery, the same density for every layer, each layer by itself, the unrepaired model, width
pruning, plain N:M by Wanda, linear top-2 token choice for the parts of an MoE layer. Where no pair of rows can be compared, nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import moe_rows
from shown import NAMES, TITLES, number

Results = dict[str, Any]
SIMPLER = {
    "score": "magnitude",
    "recover": "none",
    "allocation": "uniform",
    "goal": "layer",
    "repair": "the unrepaired model",
    "shrink": "width",
    "rewrite": "wanda",
}
CALLED = {"none": "no recovery", "uniform": "one density for all layers", "layer": "each layer by itself"}
AXES = ("score", "recover", "allocation", "goal")
SLACK = 0.01
"""Densities that differ by no more count as equal."""


@dataclass(frozen=True)
class Pair:
    """A method's row beside the simpler one's: figures of which a smaller one is better, and where they were measured."""

    family: str
    name: str
    own: float
    other: float
    simpler: str
    where: str
    shown: tuple[str, str]

    @property
    def better(self) -> bool:
        return self.own < self.other


def remarks(
    read: Callable[[str], Results | None], simpler: Callable[[str, str], str | None]
) -> dict[tuple[str, str], str]:
    """A sentence for every (family, method) that is nowhere better; `read` gives a results file or None.

    `simpler(family, name)` is what the method says of itself.
    """
    pairs: dict[tuple[str, str], list[Pair]] = {}
    for find in (_pruned, _repaired, _shrunk, _scratch, _rewritten, _routed):
        for pair in find(read, lambda family, name: simpler(family, name) or SIMPLER[family]):
            pairs.setdefault((pair.family, pair.name), []).append(pair)
    return {key: _sentence(found) for key, found in pairs.items() if not any(pair.better for pair in found)}


def _sentence(pairs: list[Pair]) -> str:
    closest = min(pairs, key=lambda pair: pair.own / max(pair.other, 1e-30))
    own, other = closest.shown
    return f"Nowhere better than {closest.simpler} where measured, at best {own} against {other} ({closest.where})."


Simpler = Callable[[str, str], str]
Read = Callable[[str], Results | None]


def _axis(recipe: Results, axis: str) -> str:
    value = recipe.get(axis) or {"allocation": "uniform", "goal": "layer"}.get(axis, "none")
    return value["name"] if isinstance(value, dict) else value


def _pruned(read: Read, simpler: Simpler) -> Iterator[Pair]:
    """Scores, recoveries, allocations and goals: rows that differ in one axis only."""
    for model, table in (read("prune_quality.json") or {}).items():
        if model not in NAMES:
            continue
        # Rows with other calibration windows are no comparison.
        rows = {key: entry for key, entry in table.items() if " @ " in key and ", draw " not in key}
        for key, entry in rows.items():
            for axis in AXES:
                yield from _beside(model, key, entry, axis, rows, simpler)


def _beside(model: str, key: str, entry: Results, axis: str, rows: Results, simpler: Simpler) -> Iterator[Pair]:
    recipe, kind = entry["recipe"], key.partition(" @ ")[2]
    axes = {one: _axis(recipe, one) for one in AXES}
    base = simpler(axis, axes[axis])
    # A score is judged by itself, not by what a recovery makes of it.
    if axes[axis] in (base, SIMPLER[axis]) or (axis == "score" and axes["recover"] != "none"):
        return
    wanted = {**axes, axis: base}
    found = [
        row
        for other, row in rows.items()
        if other.partition(" @ ")[2] == kind and _same({one: _axis(row["recipe"], one) for one in AXES}, wanted, axis)
    ]
    if found:
        best = min(found, key=lambda row: row["perplexity"])["perplexity"]
        own = entry["perplexity"]
        where = f"{NAMES[model]}, {TITLES.get(kind, kind)}"
        yield Pair(axis, axes[axis], own, best, CALLED.get(base, f"`{base}`"), where, (number(own), number(best)))


def _same(axes: dict[str, str], wanted: dict[str, str], axis: str) -> bool:
    """Equal but for the score, which a recovery that selects by itself brings along."""
    free = ("score",) if axis == "recover" and wanted["recover"] != "none" else ()
    return all(axes[one] == wanted[one] for one in AXES if one not in free)


def _repaired(read: Read, simpler: Simpler) -> Iterator[Pair]:
    """A repair beside the model that it started from; one that was undone gained nothing."""
    for model, table in (read("repair_quality.json") or {}).items():
        for key, entry in table.items() if model in NAMES else ():
            start, plus, method = key.rpartition(" + ")
            if plus and start in table and start != "dense":
                before = table[start]["perplexity"]
                own = before if entry.get("kept") is False else entry["perplexity"]
                where = f"{NAMES[model]}, {start}"
                shown = (number(own), number(before))
                yield Pair("repair", method, own, before, simpler("repair", method), where, shown)


def _shrunk(read: Read, simpler: Simpler) -> Iterator[Pair]:
    """A structured method beside the simpler one: better with no more parameters, or worse with no fewer."""
    for model, table in (read("shrink_quality.json") or {}).items():
        if not isinstance(table, dict):
            continue
        rows = [(key.split(" ")[0], row) for key, row in table.items() if key != "dense" and "refused" not in row]
        for name, row in rows:
            base = simpler("shrink", name)
            plain = [other for method, other in rows if method == base]
            if name == base or not plain:
                continue
            best = min(plain, key=_loss)
            own, other = _loss(row), _loss(best)
            comparable = (
                row["density"] <= best["density"] + SLACK if own < other else row["density"] >= best["density"] - SLACK
            )
            if comparable:
                shown = (_shown(row), _shown(best))
                yield Pair("shrink", name, own, other, f"`{base}`", NAMES.get(model, model), shown)


def _loss(row: Results) -> float:
    return row["perplexity"] if "perplexity" in row else -row["ndcg@10"]


def _shown(row: Results) -> str:
    return number(row["perplexity"]) if "perplexity" in row else f"{row['ndcg@10']:.3f}"


def _scratch(read: Read, simpler: Simpler) -> Iterator[Pair]:
    """Widths chosen before training beside those of a pruned network, both trained from scratch as long."""
    rows = (read("scratch.json") or {}).get("rows", {})
    base = simpler("shrink", "precropping")
    if f"{base}, Scratch-E" in rows:
        other = rows[f"{base}, Scratch-E"]["accuracy"]
        for label, row in rows.items():
            if label.startswith("precropping"):
                own = row["accuracy"]
                shown = (f"{own:.1%}", f"{other:.1%}")
                yield Pair("shrink", "precropping", -own, -other, f"`{base}`", "small residual network", shown)


def _rewritten(read: Read, simpler: Simpler) -> Iterator[Pair]:
    """ARMOR beside plain N:M of no more bits."""
    rows = (read("armor.json") or {}).get("quality", {}).get("rows", [])
    base = simpler("rewrite", "armor")
    for row in rows:
        plain = [one["perplexity"] for one in rows if one["method"] == base and one["bits"] <= row["bits"]]
        if row["method"].startswith("armor,") and plain:
            shown = (number(row["perplexity"]), number(min(plain)))
            where = f"stories15M, {row['bits']:.1f} bits"
            yield Pair("rewrite", "armor", row["perplexity"], min(plain), f"plain N:M by {base}", where, shown)


def _routed(read: Read, simpler: Simpler) -> Iterator[Pair]:
    """What is special in an MoE recipe beside linear top-2 token choice, by the mean over seeds: better with no more
    active parameters and without a look ahead, or worse with no fewer."""
    rows = moe_rows.fared(read("moe_compare.json") or {})
    for row in rows.values():
        found = moe_rows.verdict(row, rows)
        if found is None or found.unfair:
            continue
        for family, name in moe_rows.parts(row):
            own, other = row.loss, found.base.loss
            shown = (f"{own:.3f}", f"{other:.3f}")
            where = f"recipe `{row.name}`, trained on TinyStories and Shakespeare"
            yield Pair(family, name, own, other, moe_rows.BASES[found.base.name], where, shown)
