"""Commands that say what there is: methods and doctor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pumice.cli.console import Output, command, table
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from rich.console import Console

    from pumice.core.registry import MethodInfo
    from pumice.moe.recipes import Recipe as MoERecipe
    from pumice.recipe import Recipe

RESULTS = Path("benchmarks", "results", "prune_quality.json")


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    command(app, "methods")(methods)
    command(app, "doctor")(doctor)


def methods(
    name: Annotated[str | None, typer.Argument(help="A method or a family; default: everything.")] = None,
) -> Output:
    """Everything registered: family, paper, what it needs, patterns it accepts, measured or not."""
    rows = catalogue()
    if name is not None:
        chosen = [row for row in rows if row["family"] == name] or [row for row in rows if row["name"] == name]
        if not chosen:
            from pumice.core.registry import unknown

            raise PumiceError(
                unknown("method or family", name, {row[key] for row in rows for key in ("name", "family")})
            )
        single = all(row["name"] == name for row in chosen)
        return Output(
            chosen, (lambda c: _show_methods(c, chosen)) if not single else (lambda c: _show_method(c, chosen))
        )
    return Output(rows, lambda console: _show_methods(console, rows))


def catalogue() -> list[dict[str, Any]]:
    """Recipes and registered methods as plain data, in one list."""
    from pumice.core import registry
    from pumice.moe.recipes import recipes as moe_recipes
    from pumice.recipe import recipes

    measured = results()
    rows = [_recipe_row(one, measured) for one in recipes()] + [_moe_recipe_row(one) for one in moe_recipes()]
    return rows + [_method_row(info, measured) for info in registry.methods()]


def results() -> list[Mapping[str, Any]] | None:
    """The `recipe` of every committed quality result, or None where this installation carries no results."""
    file = Path(__file__).resolve().parents[2] / RESULTS
    if not file.is_file():
        return None
    found: list[Mapping[str, Any]] = []

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("recipe"), dict) and value.get("perplexity") is not None:
                found.append(value["recipe"])
            for item in value.values():
                visit(item)

    visit(json.loads(file.read_text(encoding="utf-8")))
    return found


def _recipe_row(recipe: Recipe, measured: list[Mapping[str, Any]] | None) -> dict[str, Any]:
    from pumice.core import registry
    from pumice.recipe import AXES, USUAL, resolve

    axes = resolve(recipe)
    parts = {axis: _name(axes.get(axis, USUAL.get(axis))) for axis in AXES}
    infos = [registry.family(family).get(str(name)) for family, name in parts.items()]
    chosen = {**parts, "pattern": recipe.pattern, "density": recipe.density}
    return {
        "family": "recipe",
        "name": recipe.name,
        "summary": recipe.summary,
        "key": recipe.key,
        "paper": recipe.paper,
        "needs": sorted({need for info in infos for need in info.needs}),
        "patterns": _accepted(**{axis: axes[axis] for axis in parts if axes.get(axis) is not None}),
        "options": {key: value for key, value in chosen.items() if value is not None},
        "measured": _measured(chosen, measured),
    }


def _moe_recipe_row(recipe: MoERecipe) -> dict[str, Any]:
    return {
        "family": "moe-recipe",
        "name": recipe.name,
        "summary": recipe.summary,
        "key": recipe.key,
        "paper": recipe.paper,
        "needs": [],
        "patterns": None,
        "options": recipe.arguments,
        "measured": None,
    }


def _method_row(info: MethodInfo, measured: list[Mapping[str, Any]] | None) -> dict[str, Any]:
    from pumice.recipe import AXES

    accepted: list[str] | None = None
    if info.family in AXES:
        accepted = _accepted(**{"score": "magnitude", info.family: info.name})
    options = {
        one.name: {"type": getattr(one.type, "__name__", str(one.type)), "default": one.default, "help": one.help}
        for one in info.options.values()
    }
    known = measured if info.family != "layout" else None
    return {
        "family": info.family,
        "name": info.name,
        "summary": info.summary,
        "key": info.key,
        "paper": info.paper,
        "needs": sorted(info.bind().needs),
        "patterns": accepted,
        "options": options,
        **({"grammar": info.extras["grammar"]} if info.family == "pattern" else {}),
        "measured": _measured({info.family: info.name}, known),
    }


def _accepted(**axes: Any) -> list[str]:
    """Pattern families that a choice of axes can be combined with: asked of the axes themselves, not of a table."""
    from pumice.core import registry
    from pumice.prune.axes import Axes

    found = []
    for info in registry.pattern.members():
        try:
            Axes.make(
                axes["score"], pattern=info.obj.examples[0], density=_density(info.obj.examples[0]), **_rest(axes)
            )
        except PumiceError:
            continue
        found.append(info.name)
    return found


def _rest(axes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in axes.items() if name != "score"}


def _density(pattern: str) -> float | None:
    from pumice.weights.patterns.base import parse

    try:
        return parse(pattern).density(None)
    except PumiceError:
        return 0.5


def _name(spec: Any) -> str | None:
    return spec["name"] if isinstance(spec, Mapping) else spec


def _measured(chosen: Mapping[str, Any], measured: list[Mapping[str, Any]] | None) -> bool | None:
    """Whether a committed result was made with these axes; None where there is nothing to look in."""
    if measured is None:
        return None
    from pumice.prune.axes import pattern_family
    from pumice.recipe import USUAL
    from pumice.weights.patterns.base import parse

    def same(recipe: Mapping[str, Any]) -> bool:
        for axis, wanted in chosen.items():
            # Results from before an axis existed were made with what is usual on it.
            got = recipe.get(axis, USUAL.get(axis))
            if axis == "pattern" and wanted is not None:
                if wanted not in (got, pattern_family(parse(str(got)))):
                    return False
            elif wanted is not None and wanted != (_name(got) if axis != "density" else got):
                return False
        return True

    return any(same(recipe) for recipe in measured)


def _show_methods(console: Console, rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    everything = max((row["patterns"] for row in rows if row["patterns"] is not None), key=len, default=[])
    shown = [
        (
            row["family"],
            row["name"],
            row["key"] or "",
            row["paper"] or "",
            ", ".join(row["needs"]),
            "" if row["patterns"] is None else _patterns(row["patterns"], everything),
            {True: "yes", False: "no", None: "unknown"}[row["measured"]],
        )
        for row in rows
    ]
    console.print(table(("family", "name", "key", "paper", "needs", "patterns", "measured"), shown))
    console.print("pumice methods NAME says more of one.")


def _patterns(accepted: list[str], everything: list[str]) -> str:
    missing = [name for name in everything if name not in accepted]
    if len(missing) < len(accepted):
        return f"all but {', '.join(missing)}" if missing else "all"
    return ", ".join(accepted)


def _show_method(console: Console, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        facts = [("family", row["family"]), ("summary", row["summary"]), ("paper", row["paper"] or "–")]
        facts += [("catalogue key", row["key"] or "–"), ("needs", ", ".join(row["needs"]) or "nothing")]
        if row["patterns"] is not None:
            facts.append(("patterns", ", ".join(row["patterns"])))
        if "grammar" in row:
            facts.append(("written as", row["grammar"]))
        for name, option in row["options"].items():
            if isinstance(option, dict) and "default" in option:
                facts.append(
                    (f"option {name}", f"{option['type']}, default {option['default']}. {option['help']}".strip())
                )
            else:
                facts.append((name, str(option)))
        facts.append(("measured", {True: "yes", False: "no", None: "unknown"}[row["measured"]]))
        console.print(table((row["name"], ""), facts))


def doctor() -> Output:
    """What this machine has, which kernels will run, and why each other one will not."""
    from pumice.doctor import examine

    found = examine()
    return Output(found, lambda console: _show_doctor(console, found))


def _show_doctor(console: Console, found: dict[str, Any]) -> None:
    from pumice.analyze.summary import size_text

    facts = [
        ("CPU", f"{found['cpu']} ({found['machine']}), {found['cores']} cores, {found['threads']} threads used"),
        ("features", " ".join(found["cpu_features"]) or "none known"),
        ("memory", size_text(found["memory"]) if found["memory"] else "unknown"),
        ("GPU", ", ".join(f"{gpu['name']} ({size_text(gpu['memory'])})" for gpu in found["gpus"]) or "none"),
        ("kernels in use", found["kernels_in_use"] or f"PyTorch only: {found['native_missing']}"),
    ]
    facts += [(name, version or "missing") for name, version in found["versions"].items()]
    console.print(table(("this machine", ""), facts))
    sets = [(name, "runs" if reason is None else reason) for name, reason in found["kernels"].items()]
    if sets:
        console.print(table(("C++ kernels", ""), sets))
    console.print(table(("layout", "backend", "here", "for"), _by_outcome(found["backends"])))
    extras = [
        (one["extra"], "present" if not one["missing"] else f"missing {', '.join(one['missing'])}", one["hint"])
        for one in found["extras"]
    ]
    console.print(table(("extra", "", "to get it"), extras))
    for problem in found["problems"]:
        console.print(f"note: {problem}", markup=False)


def _by_outcome(backends: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """One line per layout, backend and outcome, with the types and row counts that it holds for."""
    cases: dict[tuple[str, str, str], list[str]] = {}
    for row in backends:
        key = (row["layout"], row["backend"], "runs" if row["reason"] is None else row["reason"])
        device = "" if row["device"] == "cpu" else f" on {row['device']}"
        cases.setdefault(key, []).append(f"{row['dtype']}{device}, {row['rows']} row{'s' if row['rows'] > 1 else ''}")
    return [(*key, "; ".join(cases[key])) for key in cases]
