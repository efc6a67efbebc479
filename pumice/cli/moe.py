"""Commands about mixtures of experts: moe inspect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pumice.cli.console import Output, command, table
from pumice.cli.make import Device, Dtype, Model
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from rich.console import Console

    from pumice.analyze.experts import Inspection


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    group = typer.Typer(name="moe", help="Mixtures of experts: see how one uses its experts.", no_args_is_help=True)
    command(group, "inspect")(inspect)
    app.add_typer(group)


def inspect(
    model: Model,
    *,
    data: Annotated[str | None, typer.Option(help="Text to look at; default: Python's text.")] = None,
    samples: Annotated[int, typer.Option(help="Windows of text.")] = 16,
    seqlen: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder for inspect.json, load.png, kinds.png.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which windows.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> Output:
    """Show how a mixture of experts spreads its tokens: load, idle experts, and which kinds of tokens go where."""
    for name, value in (("samples", samples), ("seqlen", seqlen)):
        if value < 1:
            raise PumiceError(f"{name}={value} must be at least 1.")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise PumiceError(f"out={out!r} is a file: name a folder.")
    from pumice.analyze import experts
    from pumice.engine.data import make_data
    from pumice.engine.models import load_model

    loaded = load_model(model, device=device, dtype=dtype)
    with experts.watching(loaded.model):
        pass
    batches = make_data(loaded.model, loaded.tokenizer, data, samples=samples, seqlen=seqlen, seed=seed)
    found = experts.inspect_experts(loaded.model, batches, loaded.tokenizer)
    files = experts.write(found, Path(out)) if out is not None else []
    return Output(found.to_dict(), lambda console: _show(console, found, files))


def _show(console: Console, found: Inspection, files: list[Path]) -> None:
    columns = (
        "layer",
        "experts",
        "a token",
        "busiest",
        "idlest",
        "load CV",
        "unused",
        "first",
        "repeats",
        "specialised",
    )
    rows = []
    for layer in found.layers:
        facts = layer.to_dict()
        numbers = (f"{facts[name]:.2f}" for name in ("per_token", "load_max", "load_min", "load_cv"))
        shares = (f"{facts[name]:.0%}" for name in ("first", "repeats"))
        rows.append((layer.name, layer.experts, *numbers, len(layer.unused), *shares, f"{facts['specialisation']:.2f}"))
    console.print(table(columns, rows, right=range(1, len(columns)), title=f"{found.tokens} tokens"))
    console.print(
        "busiest, idlest: load over the layer's mean. first: the strongest expert's share of a token's weight. "
        "repeats: neighbours that share an expert. specialised: what an expert tells about the kind of token, 0 to 1."
    )
    if found.unused:
        shown = ", ".join(found.unused[:20]) + (f" and {len(found.unused) - 20} more" if len(found.unused) > 20 else "")
        console.print(f"No token went to: {shown}.")
    for file in files:
        console.print(f"wrote {file}")
