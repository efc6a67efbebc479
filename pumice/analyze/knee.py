"""Where pruning stops being free: quality against density over real prunings, and the knee of that curve.

The measurement of essential sparsity (arXiv:2306.03805, catalogue key essential-sparsity): prune once at falling
densities, no training, and find where quality falls by more than a tolerance. The paper's other measurements (weights
that vanish during pretraining, fine-tuning of the masked model) are not here.
"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pumice.core.errors import PumiceError

JSON, PNG, HTML = "search.json", "knee.png", "search.html"
DENSITIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
TOLERANCE = 0.01
RESOLUTION = 0.01


@dataclass
class Pruned:
    """One real pruning of a search: the density asked for and reached, and the quality measured."""

    asked: float
    density: float
    quality: float
    seconds: float


@dataclass
class Search:
    """A search as it stands: what was measured, and the knee as far as it is known.

    `knee` is the lowest density that, like all higher ones that were tried, is within the tolerance; `beyond` the next
    lower one tried, which is not. None where nothing, or everything, was within it.
    """

    measure: str
    lower_is_better: bool
    dense: float
    tolerance: float
    points: list[Pruned] = field(default_factory=list)
    knee: float | None = None
    beyond: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def loss(self, quality: float) -> float:
        """By what share a quality is worse than dense; negative where it is better."""
        if not self.dense:
            return 0.0 if quality == self.dense else float("inf")
        ratio = quality / self.dense
        return ratio - 1 if self.lower_is_better else 1 - ratio

    def locate(self) -> None:
        """Set the knee from the points."""
        self.points.sort(key=lambda point: -point.asked)
        self.knee = self.beyond = None
        for point in self.points:
            if self.loss(point.quality) > self.tolerance:
                self.beyond = point.asked
                break
            self.knee = point.asked

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Search:
        """Inverse of `to_dict`; PumiceError where it is none."""
        try:
            return cls(**{**content, "points": [Pruned(**point) for point in content["points"]]})
        except (KeyError, TypeError) as error:
            raise PumiceError(
                f"{JSON} is not a search that Pumice wrote ({error}): remove it, or --overwrite."
            ) from None


def sweep(
    densities: Sequence[float], measure: Callable[[float], float], accept: Callable[[float], bool]
) -> Iterator[tuple[float, float, bool]]:
    """Falling densities with their quality and whether it is accepted, up to the first that is not."""
    for density in sorted(densities, reverse=True):
        quality = measure(density)
        accepted = accept(quality)
        yield density, quality, accepted
        if not accepted:
            return


def find_knee(
    search: Search,
    prune: Callable[[float], tuple[float, float]],
    *,
    densities: Sequence[float] = DENSITIES,
    resolution: float = RESOLUTION,
    whole: bool = True,
    found: Callable[[Search], object] = lambda search: None,
) -> Search:
    """Measure a ladder of densities, then bisect between the last that is good enough and the first that is not.

    Args:
        search: holds the dense quality and the tolerance; points that it has already are not measured again.
        prune: density -> (density reached, quality) of a real pruning of the dense model.
        densities: the ladder.
        resolution: bisect until the knee is known this exactly.
        whole: measure the ladder beyond the knee too, for the curve.
        found: called after every pruning, to write the search away.

    Raises:
        PumiceError: a density outside (0, 1), or a resolution or tolerance that is not positive.
    """
    if not densities or not all(0 < density < 1 for density in densities):
        raise PumiceError(f"densities={tuple(densities)} must be one or more numbers between 0 and 1.")
    if not resolution > 0 or not search.tolerance >= 0:
        raise PumiceError(
            f"resolution={resolution} must be positive, and tolerance={search.tolerance} not be negative: "
            "0.01 stands for one per cent."
        )
    known = {point.asked: point.quality for point in search.points}

    def measure(density: float) -> float:
        if density not in known:
            start = time.perf_counter()
            reached, known[density] = prune(density)
            search.points.append(Pruned(density, reached, known[density], time.perf_counter() - start))
            search.locate()
            found(search)
        return known[density]

    for density, _, _ in sweep(densities, measure, lambda q: whole or search.loss(q) <= search.tolerance):
        assert density in known
    search.locate()
    while search.beyond is not None and (search.knee or 1.0) - search.beyond > resolution * (1 + 1e-9):
        measure(round(((search.knee or 1.0) + search.beyond) / 2, 6))
    return search


def figure(search: Search) -> Any:
    """Quality against density with the tolerance and the knee marked, as a matplotlib figure."""
    from pumice.analyze.plots import COLOURS, INK, canvas

    drawn, axes = canvas(3.4, width=6.2)
    points = sorted((point.asked, point.quality) for point in search.points)
    axes.plot(
        *zip(*points, (1.0, search.dense), strict=True), color=COLOURS[0], marker="o", markersize=4, linewidth=1.4
    )
    edge = search.dense * (1 + search.tolerance if search.lower_is_better else 1 - search.tolerance)
    axes.axhline(search.dense, color=INK, linewidth=0.8, linestyle="--")
    axes.axhspan(search.dense, edge, color=COLOURS[0], alpha=0.15)
    if search.knee is not None:
        axes.axvline(search.knee, color=COLOURS[1], linewidth=1.2)
        text = f" knee: density {search.knee:.3g}"
        axes.annotate(text, (search.knee, 0.94), xycoords=("data", "axes fraction"), color=INK, fontsize=9)
    values = [quality for _, quality in points]
    if search.lower_is_better and max(values) > 10 * search.dense > 0:
        axes.set_yscale("log")
    axes.set_xlabel("density (share of weights kept)")
    better = "lower" if search.lower_is_better else "higher"
    axes.set_ylabel(f"{search.measure} ({better} is better)")
    return drawn


def write(search: Search, folder: Path) -> list[Path]:
    """`search.json`, and where matplotlib is installed `knee.png` and the page `search.html`; returns what was written."""
    from pumice.analyze import plots
    from pumice.report import to_json, write_text

    write_text(folder / JSON, to_json(search.to_dict()))
    if not search.points or not plots.available():
        return [folder / JSON]
    picture = figure(search)
    # A page's style sheet colours the grid; a picture has none.
    picture.axes[0].grid(axis="y", color="#d0d0d0")
    picture.savefig(folder / PNG, dpi=150, facecolor="white")
    write_text(folder / HTML, page(search, plots.inline(figure(search), "knee")))
    return [folder / JSON, folder / PNG, folder / HTML]


def page(search: Search, svg: str) -> str:
    """One page with the curve and its numbers."""
    rows = "".join(
        f"<tr><td>{point.asked:.4g}</td><td>{point.quality:.4g}</td><td>{search.loss(point.quality):+.2%}</td>"
        f"<td>{point.seconds:.0f} s</td></tr>"
        for point in search.points
    )
    title = html.escape(f"{search.settings.get('method', '')} on {search.settings.get('model', '')}")
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in [verdict(search), *search.notes])
    style = (
        ":root{--ink:#1c1c1c;--line:#d0d0d0;--back:#fff}@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;"
        "--line:#444;--back:#161616}}body{font:15px sans-serif;color:var(--ink);background:var(--back);max-width:46em;"
        "margin:2em auto;padding:0 1em}td,th{padding:.2em 1em .2em 0;text-align:right}svg{width:100%}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1>{notes}{svg}<table><tr><th>density</th><th>{html.escape(search.measure)}</th>"
        f"<th>worse by</th><th>time</th></tr>{rows}</table></html>\n"
    )


def verdict(search: Search) -> str:
    """The knee in one sentence."""
    how = f"within {search.tolerance:.2g} of dense ({search.measure} {search.dense:.4g})"
    if search.knee is None:
        return f"No density that was tried stays {how}."
    if search.beyond is None:
        return f"Every density that was tried stays {how}, down to {search.knee:.4g}: try lower ones."
    return f"Down to density {search.knee:.4g} the model stays {how}; at {search.beyond:.4g} it does not."


def read(folder: Path, settings: dict[str, Any]) -> Search | None:
    """The search in a folder, to be gone on with; None where there is none.

    Raises:
        PumiceError: it was made with other settings, or its file is damaged.
    """
    file = folder / JSON
    if not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PumiceError(f"{file} cannot be read ({error}): remove it, or --overwrite.") from None
    search = Search.from_dict(stored)
    for key, value in json.loads(json.dumps(settings)).items():
        if search.settings.get(key) != value:
            raise PumiceError(
                f"resume: the search in {folder} had {key}={search.settings.get(key)!r}, now it is {value!r}; repeat its "
                "settings, or start again with --overwrite."
            )
    return search
