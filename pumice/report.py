"""One self-contained page on what pruning cost and gave, and the data behind it: `report.html` and `report.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pumice.analyze.record import FORMAT, Column, Mask, Point, Run, Sentences, Speed
from pumice.core.errors import PumiceError

__all__ = [
    "FORMAT",
    "Column",
    "Mask",
    "Point",
    "Run",
    "Sentences",
    "Speed",
    "read_runs",
    "render",
    "save_run",
    "write_report",
]

HTML, JSON = "report.html", "report.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def write_report(
    out_dir: str | Path, runs: Iterable[Run | Mapping[str, Any]], *, html: str | Path | None = None
) -> tuple[Path, Path]:
    """Write `report.html` and `report.json` into a folder.

    Args:
        out_dir: made where it does not exist.
        runs: one run, or several to be compared; `Run` or its dict.
        html: another place for the page; the JSON then lies beside it under the same name.

    Returns:
        paths of the page and of the data.

    Raises:
        PumiceError: no run, or a dict that is not one; nothing is written then.
    """
    records = [run if isinstance(run, Run) else Run.from_dict(run) for run in runs]
    if not records:
        raise PumiceError("runs is empty: give at least one run.")
    page_path = Path(html) if html is not None else Path(out_dir) / HTML
    data_path = page_path.with_suffix(".json") if html is not None else Path(out_dir) / JSON
    if page_path == data_path:
        raise PumiceError(f"html={str(html)!r} ends in .json, where the data goes: name it .html.")
    page = render(records)
    dicts = [record.to_dict() for record in records]
    content = dicts[0] if len(dicts) == 1 else {"format": FORMAT, "runs": dicts}
    write_text(data_path, to_json(content))
    write_text(page_path, page)
    return page_path, data_path


def save_run(out_dir: str | Path, run: Run) -> Path:
    """Write only the data of a run, `OUT/report.json`, for a later `pumice report`."""
    path = Path(out_dir) / JSON
    write_text(path, to_json(run.to_dict()))
    return path


def read_runs(folder: str | Path) -> list[Run]:
    """The runs of a folder (or of a report's JSON file).

    A checkpoint without `report.json`, saved from Python, gives a run of what its config.json says.

    Raises:
        PumiceError: there is neither, or the file is damaged or too new.
    """
    path = Path(folder)
    file = path / JSON if path.is_dir() else path
    if not file.is_file():
        return [_from_checkpoint(path)]
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PumiceError(f"{file} cannot be read ({error}): restore it, or prune again.") from error
    if not isinstance(content, dict):
        raise PumiceError(f"{file} is not a Pumice report: name a folder that `pumice prune` wrote.")
    many = content.get("runs")
    if isinstance(many, list):
        return [Run.from_dict(one, f"{file}, run {i}") for i, one in enumerate(many)]
    return [Run.from_dict(content, str(file))]


def _from_checkpoint(folder: Path) -> Run:
    config = folder / "config.json"
    stored: dict[str, Any] = {}
    if config.is_file():
        try:
            stored = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") or {}
        except ValueError as error:
            raise PumiceError(f"{config} is not valid JSON ({error}): restore it.") from error
    if stored.get("quant_method") != "pumice":
        raise PumiceError(
            f"{str(folder)!r} has no {JSON} and is no Pumice checkpoint: name a folder `pumice prune` wrote."
        )
    facts = stored.get("metadata") or {}
    return Run(
        title=folder.name,
        model={"name": facts.get("model") or folder.name},
        recipe=facts.get("recipe") or {},
        prune={name: facts[name] for name in ("recipe", "density", "seconds") if name in facts},
        columns=[Column("dense"), Column("sparse", density=facts.get("density"), disk_bytes=disk_bytes(folder))],
        notes=["this folder has no report.json: only what its config.json says is shown"],
    )


def disk_bytes(path: str | Path) -> int:
    """Bytes of the weight files of a checkpoint folder, or of the file itself."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for pattern in WEIGHTS for file in path.glob(pattern))


def render(runs: Sequence[Run]) -> str:
    """The page as text; it asks nobody for anything, so that it opens offline."""
    from jinja2 import Environment, PackageLoader

    from pumice.analyze import plots, summary

    loader = PackageLoader("pumice.analyze", ".")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": summary.size_text, "number": summary.number, "percent": summary.percent}
    environment.filters["paper"] = paper_link
    return environment.get_template("report.html.j2").render(
        runs=runs,
        table=summary.summarise(runs),
        inputs=list({run.model.get("name"): run.model for run in runs if run.model.get("input_bytes")}.values()),
        verdicts=[summary.verdict(run) for run in runs],
        curves=plots.curve_plots(runs),
        layer_plots=[plots.layer_plots(run) for run in runs],
        packed=[summary.packed_groups(run.packed) for run in runs],
        plot_hint=None if plots.available() else plots.HINT,
    )


def paper_link(paper: str | None) -> str | None:
    """The address of the first arXiv number in a paper's text, or None."""
    for word in (paper or "").replace(",", " ").replace(";", " ").split():
        if word.lower().startswith("arxiv:"):
            return f"https://arxiv.org/abs/{word[6:]}"
    return None


def to_json(content: Any) -> str:
    """JSON without NaN and infinity, which other readers refuse; they become null."""
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def write_text(path: Path, text: str) -> None:
    """All of the file or the old one: a killed run leaves no half report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise PumiceError(
            f"{path} cannot be written ({error.strerror or error}): free space, or choose another place."
        ) from error
