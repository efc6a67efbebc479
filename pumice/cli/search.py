"""The command that looks for the sparsest model that is still good: search."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pumice import recipe as recipes
from pumice.analyze import knee
from pumice.cli.console import Output, command, table
from pumice.cli.make import Device, Dtype, Model, with_schema
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from rich.console import Console

    from pumice.engine.models import LoadedModel

EVALUATION = ("eval_data", "eval_seqlen", "max_windows")


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    remedy = "what was measured is kept in {out}; repeat the command with --resume to go on."
    command(app, "search", on_interrupt=remedy)(with_schema(search))


def search(
    model: Model,
    *,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for search.json, knee.png and search.html.")],
    method: Annotated[str, typer.Option("--method", "-m", help="Recipe or score; see pumice methods.")] = "magnitude",
    tolerance: Annotated[float, typer.Option(help="Largest loss of quality, as a share of dense.")] = knee.TOLERANCE,
    densities: Annotated[str, typer.Option(help="Densities to measure first.")] = ",".join(map(str, knee.DENSITIES)),
    resolution: Annotated[float, typer.Option(help="How exactly the knee is to be known.")] = knee.RESOLUTION,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="AXIS.OPTION=VALUE", help="Option of a method (repeat).")
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Text to judge on; default: Python's text.")] = None,
    eval_seqlen: Annotated[int, typer.Option(help="Tokens in each window that is judged.")] = 1024,
    max_windows: Annotated[int | None, typer.Option(help="Most windows that are judged.")] = 32,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted search in OUT.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a search in OUT.")] = False,
    **fields: Any,
) -> Output:
    """Find the knee: prune at falling densities and say down to which one quality holds.

    Every point is a real pruning of the dense model, judged on text. Nothing is trained, and no model is written.
    """
    found = recipes.find(method)
    axes = {key: fields.pop(key) for key in recipes.AXES if key in fields}
    options = {**found.run(), **fields, **recipes.set_options(found, axes, settings or ())}
    ladder = _ladder(densities)
    _refuse(found, options, ladder)
    judged: dict[str, Any] = dict(zip(EVALUATION, (eval_data, eval_seqlen, max_windows), strict=True))
    facts = {"model": model, "method": method, "tolerance": tolerance, "dtype": dtype, **judged, "options": options}
    state = _open(Path(out), facts, resume, overwrite)
    from pumice.engine.models import load_model

    run = _Run(load_model(model, device=device, dtype=dtype), found, options, judged)
    if state is None:
        state = run.start(tolerance, facts)
    done = knee.find_knee(
        state, run.prune, densities=ladder, resolution=resolution, found=lambda s: knee.write(s, Path(out))
    )
    files = knee.write(done, Path(out))
    return Output(done.to_dict(), lambda console: _show(console, done, files))


def _ladder(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise PumiceError(f"densities={text!r} must be numbers with commas between: --densities 0.9,0.7,0.5.") from None


def _refuse(found: recipes.Recipe, options: dict[str, Any], ladder: list[float]) -> None:
    """What cannot be searched, before the model is loaded."""
    from pumice.prune.axes import Axes

    if options.pop("density", None) is not None:
        raise PumiceError("density: a search finds it; say which ones to try with --densities.")
    for density in ladder:
        given = {name: value for name, value in options.items() if name in (*recipes.AXES, *recipes.PLACEMENT)}
        Axes.make(**recipes.resolve(found, **given, density=density))


def _open(out: Path, facts: dict[str, Any], resume: bool, overwrite: bool) -> knee.Search | None:
    """The search to go on with, or None for a new one."""
    if resume:
        return knee.read(out, facts)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        if not overwrite or not (out / knee.JSON).is_file():
            raise PumiceError(
                f"out={str(out)!r} exists: go on with --resume, replace a search with --overwrite, or name another folder."
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    return None


class _Run:
    """Prunes copies of one model and judges them."""

    def __init__(
        self, loaded: LoadedModel, recipe: recipes.Recipe, options: dict[str, Any], judged: dict[str, Any]
    ) -> None:
        self.loaded, self.recipe, self.options, self.judged = loaded, recipe, options, judged

    def quality(self, model: Any) -> tuple[str, float]:
        """Name and value of the measure that this kind of model has."""
        from pumice.engine.evaluate import evaluate

        data, seqlen, most = (self.judged[name] for name in EVALUATION)
        found = evaluate(model, data=data, seqlen=seqlen, max_windows=most, tokenizer=self.loaded.tokenizer)
        retrieved = (found.retrieval or {}).get("ndcg@10")
        for name, value in (("perplexity", found.perplexity), ("nDCG@10", retrieved), ("accuracy", found.accuracy)):
            if value is not None:
                return name, value
        raise PumiceError(f"nothing to judge this {found.kind} by: give --eval-data with questions or labels.")

    def start(self, tolerance: float, facts: dict[str, Any]) -> knee.Search:
        from pumice.kernels.features import machine_stamp

        name, value = self.quality(self.loaded.model)
        return knee.Search(
            name,
            name == "perplexity",
            value,
            tolerance,
            settings=facts,
            machine=machine_stamp(),
            notes=self.loaded.notes,
        )

    def prune(self, density: float) -> tuple[float, float]:
        from pumice.engine.prune import prune

        model = copy.deepcopy(self.loaded.model)
        result = prune(model, self.recipe, density=density, tokenizer=self.loaded.tokenizer, **self.options)
        return result.density, self.quality(model)[1]


def _show(console: Console, found: knee.Search, files: list[Path]) -> None:
    rows = [
        (
            f"{p.asked:.4g}",
            f"{p.density:.4f}",
            f"{p.quality:,.4g}",
            f"{found.loss(p.quality):+.2%}",
            f"{p.seconds:.0f} s",
        )
        for p in found.points
    ]
    heads = ("density", "reached", found.measure, "worse than dense by", "time")
    console.print(table(heads, rows, right=range(5)))
    console.print(knee.verdict(found), markup=False)
    console.print(f"Written: {', '.join(map(str, files))}", markup=False)
