"""Perplexity after each repair of a pruned model, beside dense, beside the unrepaired one, and beside the dense model trained alike.

Protocol of prune_quality.py. A repair learns from windows of the calibration text (WikiText-2 valid; the first half of the
stories), the last sixteenth of which is held out; it never sees the evaluation text. The row "dense + …" gives the dense
model the same training for the same time: what it gains is the text's domain, not a repair.

    python benchmarks/repair_quality.py --shared ../shared --only stories15m
    python benchmarks/repair_quality.py --shared ../shared --only smollm2 --minutes 9
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import common
import prune_quality
import torch
from torch import nn

import pumice
from pumice.core import registry
from pumice.core.view import find_views
from pumice.engine import data
from pumice.engine.models import demo_model, load_tokenizer
from pumice.kernels.features import machine_stamp

RESULTS = Path(__file__).parent / "results" / "repair_quality.json"
STARTS: dict[str, dict[str, Any]] = {
    "sparsegpt @ 0.5": {"method": "sparsegpt", "density": 0.5},
    "sparsegpt @ 0.3": {"method": "sparsegpt", "density": 0.3},
    "sparsegpt @ 2:4": {"method": "sparsegpt", "pattern": "2:4"},
    "magnitude @ 0.5": {"method": "magnitude", "density": 0.5},
}
MINUTES = {"stories15m": 1.0, "smollm2-135m": 9.0}


def text_of(name: str, shared: Path) -> tuple[Any, Any]:
    """The text that repairs learn from, and the tokenizer."""
    if name == "stories15m":
        text = data.load_text(shared / "data" / "lm_text" / "tinystories_sample.txt")
        first, _ = data.halves(text if isinstance(text, list) else [text])
        return first, load_tokenizer(shared / "models" / "stories15M-hf")
    from pumice.engine.models import load_model

    return str(shared / "data" / "wikitext2" / "wiki.valid.tokens"), load_model(demo_model()).tokenizer


def start_of(name: str, key: str, dense: nn.Module, windows: torch.Tensor, cache: Path | None) -> nn.Module:
    """The pruned model that repairs start from; kept in `cache`, since several of them start from it."""
    model = copy.deepcopy(dense)
    if key == "dense":
        return model
    file = None if cache is None else cache / f"{name} {key}.pt".replace(":", "-").replace(" ", "_")
    if file is not None and file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    pumice.prune(model, data=windows, **STARTS[key])
    if file is not None:
        torch.save(model.state_dict(), file)
    return model


def run(name: str, shared: Path, minutes: float, match: str, cache: Path | None, results: dict[str, Any]) -> None:
    """Measure every missing row of one model and write the file after each."""
    load, _ = prune_quality.MODELS[name]
    dense, draw, evaluation, bf16 = load(shared)
    text, tokenizer = text_of(name, shared)
    table = results.setdefault(name, {})
    if "dense" not in table:
        table["dense"] = {"perplexity": prune_quality.judge(dense, evaluation, bf16), "machine": machine_stamp()}
    rows = [
        (start, method.name)
        for start in STARTS
        for method in registry.methods("repair")
        if not method.extras["integers"]
    ]
    rows += [("dense", "perp")]
    for start, method in rows:
        key = f"{start} + {method}"
        if match not in key or key in table:
            continue
        model = start_of(name, start, dense, draw("0"), cache)
        if start == "dense":
            with torch.no_grad():
                # A repair wants zeros: one weight is too few to matter and enough to be allowed.
                find_views(model)[0].tensor.view(-1)[0] = 0
        elif start not in table:
            table[start] = {"perplexity": prune_quality.judge(model, evaluation, bf16), "machine": machine_stamp()}
        begin = time.perf_counter()
        seqlen = min(1024, evaluation.shape[1])
        options: dict[str, Any] = {"data": text, "tokenizer": tokenizer, "seqlen": seqlen, "minutes": minutes}
        result = pumice.repair(model, method, teacher=dense, **options)
        table[key] = {
            "perplexity": prune_quality.judge(model, evaluation, bf16),
            "method": result.steps[0].method,
            "held_out": [result.before, result.after],
            "facts": result.steps[0].facts,
            "kept": result.steps[0].kept,
            "minutes": minutes,
            "seconds": round(time.perf_counter() - begin, 1),
            "peak_memory_bytes": result.peak_memory_bytes,
            "density": result.density,
            "notes": result.notes,
            "machine": machine_stamp(),
        }
        print(name, key, round(table[key]["perplexity"], 2), table[key]["seconds"], flush=True)
        common.write(RESULTS, results, protocol=__doc__)


def main() -> None:
    parser = common.arguments(__doc__, redo=False)
    parser.add_argument("--minutes", type=float, help="time for one repair (1 on stories15M, 9 on SmolLM2)")
    parser.add_argument("--cache", type=Path, help="folder that keeps the pruned models between runs")
    args = parser.parse_args()
    results = common.read(RESULTS)
    for name in prune_quality.MODELS:
        if args.only in name:
            run(name, args.shared, args.minutes or MINUTES[name], args.match, args.cache, results)


if __name__ == "__main__":
    main()
