"""The command that makes pages: report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pumice.cli.console import Output, command, names, numbers
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from rich.console import Console

    from pumice.report import Run


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    command(app, "report")(report)


def report(
    folders: Annotated[list[str], typer.Argument(metavar="OUT...", help="Folders that pumice prune wrote.")],
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page; default: OUT/report.html, of several ./report.html.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="First measure quality and speed beside the dense model it came from.")
    ] = False,
    dense: Annotated[str | None, typer.Option(help="The dense model, where it moved; for --measure.")] = None,
    data: Annotated[str | None, typer.Option(help="Text to evaluate on; for --measure.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Zero-shot tasks; for --measure.")] = None,
    tasks_dir: Annotated[Path | None, typer.Option(help="Folder of .jsonl tasks; for --measure.")] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens in each window; for --measure.")] = 1024,
    max_windows: Annotated[int | None, typer.Option(help="Most windows; for --measure.")] = 16,
    batch: Annotated[str, typer.Option(help="Batch sizes to time; for --measure.")] = "1",
    repeats: Annotated[int, typer.Option(help="Rounds of timing; for --measure.")] = 5,
    dtype: Annotated[str, typer.Option(help="Type to measure both models in; for --measure.")] = "auto",
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt to show answers to (repeat); for --measure.")] = None,
) -> Output:
    """One page that opens offline: what pruning cost and gave, dense beside sparse; several runs are compared."""
    from pumice.report import read_runs, save_run, write_report

    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise PumiceError(f"out={str(out)!r} must name the page, a file that ends in .html.")
    runs: list[Run] = []
    for folder in folders:
        found = read_runs(folder)
        runs += found
        if len(found) == 1 and Path(folder).is_dir():
            _complete(found[0], Path(folder))
            if measure:
                options: dict[str, Any] = {"data": data, "tasks": names(tasks), "tasks_dir": tasks_dir}
                options |= {"seqlen": seqlen, "max_windows": max_windows, "batch": numbers(batch, "batch")}
                _measure(found[0], folder, dense, dtype, prompts=prompt or (), repeats=repeats, **options)
            save_run(folder, found[0])
        elif measure:
            raise PumiceError(f"measure: {folder} holds a comparison of runs, not a model: name the models' folders.")
    html = out if out is not None else None if len(folders) == 1 and Path(folders[0]).is_dir() else Path("report.html")
    page, facts = write_report(folders[0], runs, html=html)
    shown = {"html": str(page), "json": str(facts), "runs": [run.title for run in runs]}
    return Output(shown, lambda console: _show(console, runs, page))


def _complete(run: Run, folder: Path) -> None:
    """Mask pictures, which cost little and need only the checkpoint."""
    if run.masks:
        return
    from pumice.analyze.masks import choose_layers, stored_pictures

    run.masks = stored_pictures(folder, choose_layers(run.layers))


def _measure(run: Run, folder: str, dense: str | None, dtype: str, **options: Any) -> None:
    from pumice.analyze.measure import measure_run
    from pumice.engine.models import load_model

    source = dense or run.model.get("source")
    if source is None:
        raise PumiceError(f"{folder} does not say which model it came from: name it with --dense MODEL.")
    sparse = load_model(folder, dtype=dtype)
    measure_run(run, load_model(source, dtype=dtype).model, sparse.model, sparse.tokenizer, **options)


def _show(console: Console, runs: list[Run], page: Path) -> None:
    from pumice.analyze.summary import summarise

    console.print(summary_table(summarise(runs)))
    console.print(f"Written to {page}", markup=False, soft_wrap=True)


def summary_table(summary: Any) -> Any:
    """The summary of a report as a table for the terminal."""
    from rich.text import Text

    from pumice.cli.console import table

    rows = []
    for row in summary.rows:
        cells = []
        for cell in row.cells:
            text = Text(cell.text)
            if cell.against:
                colour = {"sparse": "green", "dense": "yellow"}.get(cell.ahead, "")
                wins = f", {cell.ahead} wins" if cell.ahead in ("sparse", "dense") else ""
                text.append(f" ({cell.against}{wins})", style=colour)
            cells.append(text)
        rows.append((row.label, *cells))
    return table(("", *summary.columns), rows, right=range(1, len(summary.columns) + 1))
