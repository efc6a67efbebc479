"""Perplexity after one-shot pruning, every method beside dense and beside what its authors' own code gives.

Protocol (that of the reference numbers): SmolLM2-135M-Instruct, 64 calibration windows of 1024 tokens drawn at random
from WikiText-2 valid, blocks pruned in order, embeddings, head and norms dense, token perplexity over the first 48
non-overlapping windows of 1024 tokens of WikiText-2 test. stories15M: 64 windows of 256 tokens from the first half of
the stories, 192 windows of the second half, BOS before each story. Weights float32; matrix products read bf16 inputs
and accumulate in float32, in calibration (where Pumice would choose so by itself) and, on SmolLM2, in evaluation (by
PyTorch's switch for it, where the CPU heeds it).

    python benchmarks/prune_quality.py --shared ../shared            # everything that is not in the results yet
    python benchmarks/prune_quality.py --shared ../shared --only smollm2 --redo
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn

import pumice
from pumice import recipe as recipes
from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.engine import data
from pumice.engine.evaluate import perplexity
from pumice.engine.models import demo_model, load_model
from pumice.kernels.features import machine_stamp
from pumice.prune.axes import Axes

RESULTS = Path(__file__).parent / "results" / "prune_quality.json"
REFERENCE = "the authors' own code on this protocol, as given in the issue that founded this table"


@dataclass(frozen=True)
class Row:
    """One line of the table; `reference` is the perplexity of the authors' code."""

    label: str
    reference: float | None = None
    density: float | None = None
    pattern: str | None = None
    score: Any = None
    recover: Any = "none"
    allocation: Any = None
    goal: Any = None
    sequential: bool | None = None
    recipe: bool = False
    """Whether the label is the name of a recipe that comes with Pumice."""
    draw: str = "0"
    """Seed of the calibration windows; "theirs": as the authors' loaders draw with their default seed."""

    @property
    def key(self) -> str:
        return f"{self.label} @ {self.pattern or self.density}"


def rows(table: dict[tuple[float | None, str | None], dict[str, float | None]]) -> list[Row]:
    """Rows from `{(density, pattern): {label: reference}}`."""
    made = []
    for (density, pattern), methods in table.items():
        for label, reference in methods.items():
            axes, _, draw = label.partition(", draw ")
            head, _, tail = axes.partition(" + ")
            allocation = head if head in ("owl", "lamp", "global", "er", "erk") else None
            main = tail if allocation else head
            score = "obs" if main == "sparsegpt" else main
            recover = "obs" if main == "sparsegpt" else "dsnot" if tail == "dsnot" else "none"
            made.append(Row(label, reference, density, pattern, score, recover, allocation, draw=draw or "0"))
    return made


SMOLLM2 = rows(
    {
        (0.5, None): {
            "magnitude": 539.0,
            "wanda": 52.0,
            "sparsegpt": 42.9,
            "owl + sparsegpt": None,
        },
        (0.3, None): {
            "wanda": 928.0,
            "owl + wanda": 714.0,
            # At this density perplexity depends on the draw of the calibration windows by more than ten per cent.
            "owl + wanda, draw 1": 714.0,
            "owl + wanda, draw theirs": 714.0,
            "wanda, draw theirs": 928.0,
            "wanda + dsnot": 948.0,
            "sparsegpt": 180.0,
            "owl + sparsegpt": None,
        },
        (None, "2:4"): {"wanda": 161.0, "sparsegpt": 71.9, "magnitude": None},
    }
)
STORIES = rows(
    {
        (0.5, None): {
            "random": None,
            "magnitude": 17.7,
            "wanda": 10.65,
            "sparsegpt": 8.46,
            "taylor": None,
            "fisher": None,
            "wanda + dsnot": None,
            "global + magnitude": None,
            "lamp + magnitude": None,
            "er + magnitude": None,
            "erk + magnitude": None,
        },
        (0.3, None): {"wanda": 105.0, "owl + wanda": 74.5, "sparsegpt": 45.9, "owl + sparsegpt": 37.5},
        (None, "2:4"): {"magnitude": 95.0, "wanda": 30.0, "sparsegpt": 16.0},
        (None, "4:8"): {"magnitude": 36.7, "wanda": 17.6, "sparsegpt": 11.2},
    }
)


def registered() -> list[Row]:
    """A row for everything in the registry: each score, recovery, goal and allocation beside the usual rest.

    Scores alone at 50 % zeros; recoveries at 50 %, 70 % and 2:4, behind the score that they choose by themselves or behind
    Wanda's; goals with SparseGPT; allocations with Wanda and SparseGPT at 70 %; recipes that fix no density at all three.
    """
    grid: list[tuple[float | None, str | None]] = [(0.5, None), (0.3, None), (None, "2:4")]
    made: list[dict[str, Any]] = [
        {"label": info.name, "score": info.name, "density": 0.5} for info in registry.methods("score")
    ]
    for density, pattern in grid:
        at = {"density": density, "pattern": pattern}
        for recipe in recipes.recipes():
            if recipe.density is None and recipe.pattern is None:
                made.append({"label": recipe.name, "recipe": True, **recipe.axes(), **at})
        for info in registry.methods("recover"):
            own = info.extras["selects"] or "wanda"
            made.append({"label": f"{own} + {info.name}", "score": own, "recover": info.name, **at})
    for info in registry.methods("goal"):
        made.append(
            {
                "label": f"sparsegpt toward {info.name}",
                "score": "obs",
                "recover": "obs",
                "goal": info.name,
                "density": 0.5,
            }
        )
    for info in registry.methods("allocation"):
        for label, score, recover in (("wanda", "wanda", "none"), ("sparsegpt", "obs", "obs")):
            axes = {"score": score, "recover": recover, "allocation": info.name, "density": 0.3}
            made.append({"label": f"{info.name} + {label}", **axes})
    return [Row(**one) for one in made if _makes_sense(one)]


def _makes_sense(axes: dict[str, Any]) -> bool:
    try:
        Axes.make(
            **{name: value for name, value in axes.items() if name not in ("label", "recipe") and value is not None}
        )
    except PumiceError:
        return False
    return True


def distinct(given: list[Row]) -> list[Row]:
    """The rows without those that are another one by another name; the first name stays."""
    seen: dict[Any, Row] = {}
    for row in given:
        what = {"recover": "none", "allocation": "uniform", "goal": "layer", "sequential": False}
        what |= {k: v for k, v in asdict(row).items() if v is not None and k not in ("label", "reference", "recipe")}
        seen.setdefault(json.dumps(what, sort_keys=True, default=str), row)
    return list(seen.values())


Draw = Callable[[str], torch.Tensor]


def their_windows(ids: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Windows at the places where Wanda's, SparseGPT's and OWL's loaders cut them: Python's `random`, seed 0."""
    generator = random.Random(0)
    starts = [generator.randint(0, len(ids) - length - 1) for _ in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])


def smollm2(shared: Path) -> tuple[nn.Module, Draw, torch.Tensor, bool]:
    """Model, calibration windows by draw, evaluation windows, whether evaluation reads bf16 inputs."""
    loaded = load_model(demo_model(), dtype=torch.float32)
    text = shared / "data" / "wikitext2"
    valid = data.tokenize((text / "wiki.valid.tokens").read_text(), loaded.tokenizer)
    test = data.tokenize((text / "wiki.test.raw.joined.txt").read_text(), loaded.tokenizer)
    evaluation = data.consecutive_windows(test, 1024, 48)

    def draw(name: str) -> torch.Tensor:
        if name == "theirs":
            return their_windows(valid, 64, 1024)
        return data.random_windows(valid, 64, 1024, int(name))

    return loaded.model, draw, evaluation, True


def stories(shared: Path) -> tuple[nn.Module, Draw, torch.Tensor, bool]:
    """Likewise for stories15M."""
    loaded = load_model(shared / "models" / "stories15M-hf", dtype=torch.float32)
    text = data.load_text(shared / "data" / "lm_text" / "tinystories_sample.txt")
    first, second = data.halves(text if isinstance(text, list) else [text])
    evaluation = data.windows_from_documents(second, loaded.tokenizer, 192, 256)

    def draw(name: str) -> torch.Tensor:
        return data.windows_from_documents(first, loaded.tokenizer, 64, 256, random=True, seed=int(name))

    return loaded.model, draw, evaluation, False


MODELS: dict[str, tuple[Callable[[Path], Any], list[Row]]] = {
    "stories15m": (stories, distinct([*STORIES, *registered()])),
    # A row takes minutes here, so that only the recipes that solve something join those with a reference.
    "smollm2-135m": (
        smollm2,
        distinct([*SMOLLM2, *(row for row in registered() if row.recipe and row.recover not in (None, "none"))]),
    ),
}


@contextmanager
def bf16_matmul(enabled: bool) -> Iterator[None]:
    """Float32 matmuls read their inputs as bf16 (oneDNN on CPU), where torch offers it."""
    backend = getattr(torch.backends.mkldnn, "matmul", None)
    if not enabled or backend is None or not hasattr(backend, "fp32_precision"):
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def judge(model: nn.Module, windows: torch.Tensor, bf16: bool) -> float:
    with bf16_matmul(bf16):
        return perplexity(model, windows)


def run(name: str, shared: Path, results: dict[str, Any], redo: bool, match: str) -> None:
    """Measure every missing row of one model and write the file after each."""
    load, wanted = MODELS[name]
    missing = [row for row in wanted if match in row.key and (redo or row.key not in results.get(name, {}))]
    if not missing:
        return
    dense, calibration, evaluation, bf16 = load(shared)
    table = results.setdefault(name, {})
    if redo or "dense" not in table:
        table["dense"] = {"perplexity": judge(dense, evaluation, bf16), "machine": machine_stamp()}
        print(name, "dense", table["dense"]["perplexity"], flush=True)
    for row in missing:
        model = copy.deepcopy(dense)
        axes = {k: v for k, v in asdict(row).items() if k not in ("label", "reference", "recipe", "draw")}
        start = time.perf_counter()
        # Magnitude and random look at no data; without any they need no walk through the model.
        given = None if row.label in ("magnitude", "random") else calibration(row.draw)
        result = pumice.prune(model, row.score, data=given, compute="bfloat16" if bf16 else "float32", **axes)
        seconds = time.perf_counter() - start
        table[row.key] = {
            "method": row.label,
            "recipe": result.recipe,
            "perplexity": judge(model, evaluation, bf16),
            "authors": row.reference,
            "density": result.density,
            "seconds": round(seconds, 1),
            "peak_memory_bytes": result.peak_memory_bytes,
            "machine": machine_stamp(),
        }
        print(name, row.key, {k: table[row.key][k] for k in ("perplexity", "authors", "seconds")}, flush=True)
        common.write(RESULTS, results, protocol=__doc__, authors=REFERENCE)


def main() -> None:
    args = common.arguments(__doc__).parse_args()
    results = common.read(RESULTS)
    for name in MODELS:
        if args.only in name:
            run(name, args.shared, results, args.redo, args.match)


if __name__ == "__main__":
    main()
