"""What every command shares: one result as JSON or for people, one line per error, exit codes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from rich.console import Console

REFUSED, INTERRUPTED = 2, 130


@dataclass
class Output:
    """What a command found: plain data for `--json`, and how people get to see it."""

    data: Any
    show: Callable[[Console], None]


def command(app: typer.Typer, name: str, *, on_interrupt: str = "") -> Callable[[Callable[..., Output]], Any]:
    """Decorator: a function that returns `Output` becomes a command with `--json`.

    A `PumiceError` (or a file that cannot be read or written) is one line on stderr and exit code 2; Ctrl-C is exit code 130 with `on_interrupt` as the remedy
    (its {out} is the option `out`). With `--json` everything but the JSON goes to stderr.
    """

    def register(function: Callable[..., Output]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**options: Any) -> None:
            as_json = options.pop("as_json")
            try:
                with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                    output = function(**options)
            except PumiceError as error:
                fail(str(error))
                raise typer.Exit(REFUSED) from None
            except OSError as error:
                # Files of the user's that a library opens by itself; the remedy is in the reason.
                place = f"{error.filename}: " if error.filename else ""
                fail(f"{place}{error.strerror or error}: check the path, its permissions and the free space.")
                raise typer.Exit(REFUSED) from None
            except KeyboardInterrupt:
                interrupted(on_interrupt.format(out=options.get("out") or "OUT"))
                raise typer.Exit(INTERRUPTED) from None
            if as_json:
                from pumice.report import to_json

                typer.echo(to_json(output.data), nl=False)
            else:
                output.show(console())

        parameters = list(inspect.signature(function, eval_str=True).parameters.values())
        help_text = "Print only JSON on stdout; progress goes to stderr."
        hint = Annotated[bool, typer.Option("--json", help=help_text)]
        parameters.append(inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hint))
        set_signature(run, parameters)
        return app.command(name)(run)

    return register


def set_signature(function: Any, parameters: Sequence[inspect.Parameter]) -> None:
    """Make a function look as if it had these parameters: what Typer reads the options from."""
    order = {inspect.Parameter.POSITIONAL_OR_KEYWORD: 0, inspect.Parameter.KEYWORD_ONLY: 1}
    function.__signature__ = inspect.Signature(sorted(parameters, key=lambda one: order[one.kind]))
    function.__annotations__ = {one.name: one.annotation for one in parameters}
    # Otherwise Typer follows it to the original function's signature.
    function.__dict__.pop("__wrapped__", None)


def fail(message: str) -> None:
    """The one line of an error."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def interrupted(remedy: str) -> None:
    print(f"interrupted{': ' + remedy if remedy else '.'}", file=sys.stderr)


def console() -> Console:
    """Standard output for people; wide enough for a table where it is no terminal."""
    from rich.console import Console

    found = Console(highlight=False)
    if not found.is_terminal:
        found = Console(highlight=False, width=160)
    return found


def table(
    columns: Iterable[str], rows: Iterable[Sequence[Any]], *, title: str | None = None, right: Iterable[int] = ()
) -> Any:
    """A plain table; `right` are the columns to align right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    aligned = set(right)
    for index, name in enumerate(columns):
        made.add_column(name, justify="right" if index in aligned else "left", overflow="fold")
    for row in rows:
        # Layer names and reasons hold brackets, which Rich would read as markup.
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made


def command_line() -> str:
    """The exact command, to be shown in reports."""
    return shlex.join(["pumice", *sys.argv[1:]])


def numbers(text: str | None, name: str) -> tuple[int, ...]:
    """`"1,16"` as (1, 16); PumiceError otherwise."""
    try:
        return tuple(int(part) for part in (text or "").split(",") if part.strip())
    except ValueError:
        raise PumiceError(f"{name}={text!r} must be whole numbers with commas between: --{name} 1,16.") from None


def names(values: Iterable[str] | None) -> list[str]:
    """Repeated options and commas in them as one list; a regular expression (`re:…`) keeps its commas."""
    found: list[str] = []
    for value in values or ():
        found += [value] if value.startswith("re:") else [part.strip() for part in value.split(",") if part.strip()]
    return found
