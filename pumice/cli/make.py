"""Commands that write models: prune, shrink and export."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pumice import recipe as recipes
from pumice.cli.console import Output, command, command_line, names, set_signature, table
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from rich.console import Console

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face id, folder, GGUF file or Pumice checkpoint.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="Type to load the weights in: auto, bfloat16, float16 or float32.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")]


def with_schema(function: Callable[..., Output]) -> Callable[..., Output]:
    """Give a command the fields of `Recipe` as options; it receives the given ones as keyword arguments."""

    def run(**options: Any) -> Output:
        given = {name: options.pop(name) for name in keys if name in options}
        fields = {name: value for name, value in given.items() if value not in (None, [])}
        for name in ("targets", "ignore"):
            if name in fields:
                fields[name] = names(fields[name])
        return function(**options, **fields)

    keys = [name for name in recipes.schema() if name not in recipes.ABOUT]
    own = inspect.signature(function, eval_str=True).parameters.values()
    parameters = [one for one in own if one.kind is not inspect.Parameter.VAR_KEYWORD]
    for name in keys:
        one = recipes.schema()[name]
        kind: Any = {recipes.Spec: str, tuple[str, ...]: list[str]}.get(one.type, one.type)
        text, metavar = f"{one.help[0].upper()}{one.help[1:]}.", None
        if kind == list[str]:
            text, metavar = f"{text[:-1]} (repeat, or separate by commas).", "NAMES"
        hint = Annotated[kind | None, typer.Option(f"--{name}", help=text, metavar=metavar)]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))
    set_signature(run, parameters)
    run.__doc__ = function.__doc__
    run.__name__ = function.__name__
    return run


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    remedy = "finished blocks are kept in {out}.partial; repeat the command with --resume to go on."
    command(app, "prune", on_interrupt=remedy)(with_schema(prune))
    command(app, "repair", on_interrupt="nothing was written; the model is as it was.")(repair)
    command(app, "shrink")(shrink)
    command(app, "export")(export)


def prune(
    model: Model,
    *,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder to write; needed unless --dry-run.")] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="Recipe or score; see pumice methods.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe of your own, a YAML file.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="AXIS.OPTION=VALUE", help="Option of a method, as recover.damp=0.05 (repeat)."),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    repairs: Annotated[
        list[str] | None,
        typer.Option("--repair", metavar="NAMES", help="Repairs to do afterwards, in order (pumice methods repair)."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Time for the repairs together.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be pruned and kept, and its time, memory and disk.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run to the same OUT.")] = False,
    overwrite: Overwrite = False,
    **fields: Any,
) -> Output:
    """Prune a model and save it small.

    The method is a recipe over axes (score, recovery, allocation, goal, pattern); options given here override it. Blocks
    that are finished survive an interruption; --resume goes on.
    """
    if method is not None and recipe is not None:
        raise PumiceError(f"method={method!r} and recipe={str(recipe)!r} exclude each other: give one of them.")
    if out is None and not dry_run:
        raise PumiceError("out is missing: say where the pruned model goes, -o OUT, or ask for --dry-run.")
    name: Any = recipe if recipe is not None else method or "auto"
    found: Any = recipes.find(name)
    axes = {key: fields.pop(key) for key in recipes.AXES if key in fields}
    fields = {**found.run(), **fields, **recipes.set_options(found, axes, settings or ())}
    from pumice.engine.prune import plan_prune
    from pumice.engine.prune import prune as run_prune

    fields |= {"device": device, "dtype": dtype}
    plan = plan_prune(model, found, **fields).to_dict()
    if dry_run:
        return Output(plan, lambda console: _show_plan(console, plan))
    assert out is not None
    methods = repair_specs(repairs, ()) if repairs else []
    result = run_prune(
        model, found, out=out, resume=resume, overwrite=overwrite, repair=methods or None, minutes=minutes, **fields
    )
    from pumice.analyze.measure import pruned_run
    from pumice.report import save_run

    run = pruned_run(result, out, source=model, plan=plan, recipe=found, command=command_line())
    save_run(out, run)
    data = {**result.to_dict(), "disk_bytes": {column.name: column.disk_bytes for column in run.columns}}
    return Output(data, lambda console: _show_result(console, data, out))


def repair_specs(given: list[str], settings: Sequence[str]) -> list[Any]:
    """Repairs by name with settings like `perp.rank=8` applied; PumiceError for what does not fit."""
    from pumice.core import registry

    specs: dict[str, dict[str, Any]] = {name: {"name": name} for name in names(given)}
    for setting in settings:
        target, equals, value = setting.partition("=")
        name, dot, option = target.strip().partition(".")
        if not (equals and dot and option) or name not in specs:
            raise PumiceError(f"set={setting!r} is not REPAIR.OPTION=VALUE with REPAIR one of {', '.join(specs)}.")
        specs[name] |= registry.repair.get(name).bind({option: value.strip()}).options
    for spec in specs.values():
        registry.repair.bind(spec)
    return list(specs.values())


def repair(
    model: Model,
    *,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write.")],
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", metavar="NAMES", help="Repairs in order (pumice methods repair); default perp."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="The dense model: guides training, and refits need it.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Time for all of them together; default each one's own.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="REPAIR.OPTION=VALUE", help="Option of a repair, as perp.rank=8 (repeat)."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Text to learn from: file or Hugging Face dataset.")] = None,
    samples: Annotated[int, typer.Option(help="Windows of text.")] = 256,
    seqlen: Annotated[int, typer.Option(help="Tokens in each window.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the windows and of the training.")] = 0,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> Output:
    """Retrain or refit what a pruned model has left; its zeros stay zeros, and a repair that makes it worse is undone."""
    specs = repair_specs(method or ["perp"], settings or ())
    from pumice.engine.repair import repair as run_repair

    given: dict[str, Any] = {"samples": samples, "seqlen": seqlen, "seed": seed, "device": device}
    result = run_repair(
        model, specs, data=data, teacher=teacher, minutes=minutes, out=out, overwrite=overwrite, **given
    )
    data_out = result.to_dict()
    return Output(data_out, lambda console: _show_repair(console, data_out))


def _show_repair(console: Console, data: dict[str, Any]) -> None:
    for step in data["steps"]:
        gone = "" if step["kept"] else ", undone"
        console.print(
            f"{step['method']['name']}: held-out loss {step['before']:.4f} to {step['after']:.4f} in {step['seconds']:,.0f} s{gone}."
        )
    _show_notes(console, data["notes"])
    if data["path"]:
        console.print(f"Written to {data['path']}. Next: pumice eval {data['path']}", markup=False)


def shrink(
    model: Model,
    *,
    method: Annotated[str, typer.Option("--method", "-m", help="How; see pumice methods shrink.")],
    density: Annotated[float, typer.Option(help="Share of the parameters inside the blocks that stays, in (0, 1].")],
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder to write; needed unless --dry-run.")] = None,
    data: Annotated[str | None, typer.Option(help="Calibration text: file or Hugging Face dataset.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="OPTION=VALUE", help="Option of the method (repeat).")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens in each calibration window.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the calibration draw and of whatever else is drawn.")] = 0,
    compute: Annotated[str, typer.Option(help="Matrix products while calibrating: auto, float32, bfloat16.")] = "auto",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what could be removed; write nothing.")] = False,
    overwrite: Overwrite = False,
) -> Output:
    """Remove whole channels, heads or blocks and save the smaller model.

    Where all layers stay alike, OUT is a plain Transformers checkpoint that loads without Pumice.
    """
    if out is None and not dry_run:
        raise PumiceError("out is missing: say where the smaller model goes, -o OUT, or ask for --dry-run.")
    from pumice.engine.files import check_free
    from pumice.engine.shrink import plan_shrink, save_shrunk, shrink_result

    chosen = {"name": method, **dict(_option(setting) for setting in settings or ())}
    if dry_run:
        plan = plan_shrink(model, chosen, density=density).to_dict()
        return Output(plan, lambda console: _show_groups(console, plan))
    assert out is not None
    if not overwrite:
        check_free(Path(out))
    run = {"samples": samples, "seqlen": seqlen, "seed": seed, "compute": compute, "device": device, "dtype": dtype}
    result = shrink_result(model, chosen, density=density, data=data, **run)
    path = save_shrunk(result, out, overwrite=overwrite)
    from pumice.report import disk_bytes

    found = {**result.to_dict(), "path": str(path), "disk_bytes": disk_bytes(path)}
    return Output(found, lambda console: _show_shrunk(console, found))


def _option(setting: str) -> tuple[str, str]:
    name, equals, value = setting.partition("=")
    if not equals or not name.strip():
        raise PumiceError(f"set={setting!r} is not OPTION=VALUE: write heads=true.")
    return name.strip(), value.strip()


def _show_groups(console: Console, plan: dict[str, Any]) -> None:
    rows = [
        (
            group["name"],
            group["kind"],
            f"{group['units']:,}",
            f"{group['params_per_unit']:,}",
            group["block"] or "several",
        )
        for group in plan["groups"]
    ]
    console.print(table(("read by", "unit", "units", "parameters of one", "block"), rows, right=(2, 3)))
    counts = plan["parameters"]
    console.print(f"{counts['blocks']:,} of {counts['all']:,} parameters lie inside the blocks.")
    console.print(f"{counts['to_remove']:,} of them would go. Nothing was written.")
    _show_notes(console, plan["notes"])


def _show_shrunk(console: Console, data: dict[str, Any]) -> None:
    from pumice.analyze.summary import percent, size_text

    counts = data["parameters"]
    console.print(f"{data['method']['name']}: {counts['all_before']:,} parameters became {counts['all']:,}")
    console.print(f"in {data['seconds']:,.0f} s; {percent(data['density'])} of those inside the blocks are left.")
    _show_notes(console, data["notes"])
    how = "a plain Transformers checkpoint" if data["ordinary"] else "Pumice's format"
    console.print(f"Written to {data['path']}: {how}, {size_text(data['disk_bytes'])}.", markup=False)


def _show_plan(console: Console, plan: dict[str, Any]) -> None:
    from pumice.analyze.summary import size_text

    pruned, kept = plan.get("pruned", []), plan.get("kept", [])
    total = sum(layer.get("params", 0) for layer in pruned)
    console.print(table(("to prune", "shape", "weights"), [_plan_row(layer) for layer in pruned], right=(1, 2)))
    if kept:
        console.print(table(("kept dense", "why"), [(layer["name"], layer.get("reason", "")) for layer in kept]))
    console.print(f"{len(pruned)} layers with {total:,} weights to prune, {len(kept)} kept dense.")
    facts = [
        f"about {plan['seconds']:,.0f} s" if plan.get("seconds") is not None else "",
        f"{size_text(plan['memory_bytes'])} of memory" if plan.get("memory_bytes") is not None else "",
        f"{size_text(plan['disk_bytes'])} on disk" if plan.get("disk_bytes") is not None else "",
    ]
    console.print(
        f"It would take {', '.join(fact for fact in facts if fact) or 'an unknown time'}. Nothing was written."
    )
    _show_notes(console, plan.get("notes", []))


def _plan_row(layer: dict[str, Any]) -> tuple[str, str, str]:
    return layer["name"], " × ".join(map(str, layer["shape"])), f"{layer.get('params', 0):,}"


def _show_result(console: Console, data: dict[str, Any], out: str) -> None:
    from pumice.analyze.summary import percent, size_text

    layers = data["layers"]
    errors = [layer["error"] for layer in layers if layer.get("error") is not None]
    console.print(f"{data['recipe']['name']}: {len(layers)} layers pruned in {data['seconds']:,.0f} s.")
    console.print(f"{percent(data['density'])} of their weights are kept, pattern {data['recipe']['pattern']}.")
    if errors:
        worst = max(layers, key=lambda layer: layer.get("error") or 0.0)
        mean = sum(errors) / len(errors)
        console.print(f"Output error {mean:.3f} on average, {worst['error']:.3f} at most ({worst['name']}).")
    sizes = {name: size for name, size in data["disk_bytes"].items() if size}
    console.print("On disk: " + ", ".join(f"{name} {size_text(size)}" for name, size in sizes.items()) + ".")
    _show_notes(console, data["notes"])
    if data.get("repair"):
        _show_repair(console, {**data["repair"], "path": None})
    console.print(f"Written to {out}. Next: pumice report {out} --measure")


def _show_notes(console: Console, notes: list[str]) -> None:
    for note in notes:
        console.print(f"note: {note}", markup=False)


def export(
    model: Model,
    *,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write.")],
    form: Annotated[str, typer.Option("--format", help="dense (loads everywhere) or onnx.")] = "dense",
    overwrite: Overwrite = False,
) -> Output:
    """Write a model for readers that know nothing of Pumice."""
    from pumice.engine.export import export as run_export
    from pumice.report import disk_bytes

    path = run_export(model, out, format=form, overwrite=overwrite)
    size = (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if form == "onnx" else disk_bytes(path)
    )
    data = {"path": str(path), "format": form, "bytes": size}

    def show(console: Console) -> None:
        from pumice.analyze.summary import size_text

        console.print(f"Written to {path}: {form}, {size_text(size)}.", markup=False)

    return Output(data, show)
