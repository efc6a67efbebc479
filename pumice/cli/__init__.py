"""The command line: one verb per thing that one does with a model."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from pumice.cli.console import INTERRUPTED, interrupted

__all__ = ["app", "main"]

app = typer.Typer(
    name="pumice",
    help="Sparse neural networks that are really smaller and faster: prune, store, run, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for found in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
    part = importlib.import_module(found.name)
    if hasattr(part, "add_to"):
        part.add_to(app)


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        from pumice import __version__

        typer.echo(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point `pumice`: exit code 0, 2 for a refused request, 130 after Ctrl-C."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except KeyboardInterrupt:
        # Before a command has begun, while modules are imported.
        interrupted("")
        sys.exit(INTERRUPTED)
