"""What one pruning run left behind, as plain data: the content of `OUT/report.json`, from which reports are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from pumice.core.errors import PumiceError

FORMAT = 1
T = TypeVar("T")


@dataclass
class Speed:
    """Median rates at one batch size: tokens per second over the whole batch (examples per second for `forward`)."""

    batch: int
    prefill: float | None = None
    decode: float | None = None
    forward: float | None = None


@dataclass
class Column:
    """One model of the summary table; None where a measure was not taken. The first column of a run is the dense one.

    `kl` in nats and `top1` (share of equal argmaxes) against dense; `cosine` of embeddings against dense;
    `disk_bytes` of the weight files, `memory_bytes` of parameters and buffers; `tasks`: name -> measures.
    """

    name: str
    density: float | None = None
    perplexity: float | None = None
    seqlen: int | None = None
    windows: int | None = None
    kl: float | None = None
    top1: float | None = None
    cosine: float | None = None
    accuracy: float | None = None
    retrieval: float | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    disk_bytes: int | None = None
    memory_bytes: int | None = None
    speed: list[Speed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_quality(self, result: Any) -> Column:
        """Take over what `pumice.evaluate` found (EvalResult or its dict); returns self."""
        found = result if isinstance(result, Mapping) else result.to_dict()
        for name in ("perplexity", "seqlen", "windows", "accuracy"):
            setattr(self, name, found.get(name))
        for name in ("kl", "top1", "cosine"):
            setattr(self, name, (found.get("agreement") or {}).get(name))
        self.retrieval = (found.get("retrieval") or {}).get("ndcg@10")
        self.tasks = dict(found.get("tasks") or {})
        return self

    def add_speed(self, result: Any, name: str) -> Column:
        """Take over the rows and bytes of `pumice.bench` (BenchResult or its dict) called `name`; returns self."""
        found = result if isinstance(result, Mapping) else result.to_dict()
        rows = [row for row in found["rows"] if row["name"] == name]
        self.speed = [Speed(row["batch"], row["prefill"], row["decode"], row["forward"]) for row in rows]
        self.memory_bytes = found["bytes"].get(name, self.memory_bytes)
        return self


@dataclass
class Point:
    """One density of a sweep over the same model; `decode` and `prefill` in tokens per second, batch 1.

    `series` names the line it belongs to where a sweep covers several methods; `label` is a remark.
    """

    density: float
    perplexity: float | None = None
    top1: float | None = None
    prefill: float | None = None
    decode: float | None = None
    disk_bytes: int | None = None
    label: str = ""
    series: str = ""


@dataclass
class Sentences:
    """One prompt and what each column's model made of it."""

    prompt: str
    texts: dict[str, str]


@dataclass
class Mask:
    """Pictures of one layer's nonzero pattern: the whole as a density map, and its corner weight by weight."""

    layer: str
    shape: tuple[int, int]
    density: float
    png_base64: str
    corner_base64: str | None = None
    corner: tuple[int, int] | None = None


@dataclass
class Run:
    """Everything a report shows of one run.

    `model`: name, source, input_bytes, input_format, kind, parameters (all optional). `prune`: `PruneResult.to_dict()`.
    `kept`: `{name, reason}` of layers left dense. `packed`: the layers of `pumice.describe`. `bench`: settings of the
    timing. `columns[0]` is dense.
    """

    command: str = ""
    title: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    prune: dict[str, Any] = field(default_factory=dict)
    columns: list[Column] = field(default_factory=list)
    curve: list[Point] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    packed: list[dict[str, Any]] = field(default_factory=list)
    bench: dict[str, Any] = field(default_factory=dict)
    generations: list[Sentences] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def denses(self) -> list[Column]:
        """The dense columns: the first, and any other of density 1 (the same model on better dense kernels)."""
        return [*self.columns[:1], *(column for column in self.columns[1:] if column.density == 1.0)]

    @property
    def sparses(self) -> list[Column]:
        """All other columns."""
        return [column for column in self.columns[1:] if column.density != 1.0]

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Per-layer results of the pruning."""
        return self.prune.get("layers", [])

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON; `from_dict` turns it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "report") -> Run:
        """A run from its dict.

        Raises:
            PumiceError: written by a newer version, or not a run at all.
        """
        version = content.get("format")
        if not isinstance(version, int):
            raise PumiceError(
                f"{source} is not a Pumice report (it has no format number): name a folder `pumice prune` wrote."
            )
        if version > FORMAT:
            raise PumiceError(f"{source} has format {version}, newer than the {FORMAT} known here: upgrade Pumice.")
        try:
            run = _make(cls, content)
            run.columns = [_make(Column, column) for column in content.get("columns", [])]
            for column in run.columns:
                column.speed = [_make(Speed, speed) for speed in column.speed]  # type: ignore[arg-type]
            run.curve = [_make(Point, point) for point in content.get("curve", [])]
            run.generations = [_make(Sentences, one) for one in content.get("generations", [])]
            run.masks = [_make(Mask, mask) for mask in content.get("masks", [])]
        except (TypeError, AttributeError) as error:
            raise PumiceError(f"{source} is damaged ({error}): prune again, or restore the file.") from error
        return run


def _make(cls: type[T], content: Mapping[str, Any]) -> T:
    """A dataclass from its dict; keys it does not know are left out, so that notes added by hand do no harm."""
    known = {one.name for one in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in content.items() if name in known})
