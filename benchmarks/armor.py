"""ARMOR beside plain N:M on stories15M: perplexity at equal bytes, and milliseconds with the wrappers counted.

Plain masks are 2:4 (as ARMOR's core) and the N:M patterns whose bytes come next to ARMOR's, all as bf16 values with
packed codes. Perplexity as in prune_quality.py (float32 weights). Times are of one layer in bf16, weights out of cache,
medians of interleaved rounds; the dense layer (PyTorch) is in the same run.

    python benchmarks/armor.py --shared ../shared            # writes benchmarks/results/armor.json
    python benchmarks/armor.py --shared ../shared --part quality | time
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from prune_quality import judge, stories
from torch import Tensor, nn

import pumice
from pumice.core import select
from pumice.kernels.features import machine_stamp
from pumice.weights.layouts.base import pack
from pumice.weights.modules import SparseLinear
from pumice.weights.wrapped import WrappedLinear

RESULTS = Path(__file__).parent / "results" / "armor.json"
COLD_BYTES = 256 << 20


def bits_per_weight(n: int, m: int) -> float:
    """bf16 values and a code for each group, as the layout nm stores them (rows are padded to a byte)."""
    packed = pack(pruned(256, 256, n, m), "nm", n=n, m=m)
    return packed.nbytes * 8 / (256 * 256)


def pruned(o: int, i: int, n: int, m: int) -> Tensor:
    w = torch.randn(o, i, generator=torch.Generator().manual_seed(0))
    return (w * select.n_of_m(w.abs(), n, m)).bfloat16()


def layer_bits(model: nn.Module) -> float:
    """Bits per original weight of the wrapped layers, 2:4 core and bf16 wrappers."""
    bits = weights = 0.0
    for module in model.modules():
        if isinstance(module, WrappedLinear):
            size = module.out_features * module.in_features
            weights += size
            bits += bits_per_weight(2, 4) * size + 16 * (module.left.numel() + module.right.numel())
    return bits / weights


def quality(shared: Path) -> list[dict[str, Any]]:
    dense, calibration, evaluation, bf16 = stories(shared)
    draw = calibration("0")
    rows = [{"method": "dense", "bits": 16.0, "perplexity": judge(dense, evaluation, bf16)}]
    for block, rounds in ((64, 0), (16, 100), (32, 100), (64, 100)):
        model = copy.deepcopy(dense)
        method = {"name": "armor", "block": block, "rounds": rounds}
        result = pumice.rewrite(model, method, data=draw, compute="float32", progress=False)
        name = f"armor, blocks <= {block}" if rounds else "armor's start (NoWag-P, wrappers not needed)"
        bits = layer_bits(model) if rounds else bits_per_weight(2, 4)
        rows.append({"method": name, "pattern": "2:4", "bits": bits, "seconds": round(result.seconds, 1)})
        rows[-1]["perplexity"] = judge(model, evaluation, bf16)
        print(rows[-1], flush=True)
    for pattern in ("2:4", "9:16", "5:8", "3:4"):
        for score, recover in (("wanda", "none"), ("obs", "obs")):
            model = copy.deepcopy(dense)
            result = pumice.prune(
                model, score, recover=recover, pattern=pattern, data=draw, compute="float32", progress=False
            )
            n, m = (int(part) for part in pattern.split(":"))
            name = "sparsegpt" if recover == "obs" else score
            rows.append({"method": name, "pattern": pattern, "bits": bits_per_weight(n, m)})
            rows[-1] |= {"seconds": round(result.seconds, 1), "perplexity": judge(model, evaluation, bf16)}
            print(rows[-1], flush=True)
    return rows


def layers(o: int, i: int, block: int) -> dict[str, tuple[nn.Module, int]]:
    """One layer in each form, and its bytes."""
    core = SparseLinear(pack(pruned(o, i, 2, 4), "nm", n=2, m=4))
    denser = SparseLinear(pack(pruned(o, i, 5, 8), "nm", n=5, m=8))
    dense = nn.Linear(i, o, bias=False, dtype=torch.bfloat16)
    wrap = [torch.randn(size // block, block, block).bfloat16() for size in (o, i)]
    wrapped = WrappedLinear(wrap[0], SparseLinear(pack(pruned(o, i, 2, 4), "nm", n=2, m=4)), wrap[1])
    extra = sum(w.numel() * 2 for w in wrap)
    return {
        "dense": (dense, o * i * 2),
        "2:4": (core, core.nbytes),
        "5:8": (denser, denser.nbytes),
        f"armor 2:4, blocks {block}": (wrapped, core.nbytes + extra),
    }


def timed(o: int, i: int, block: int, rows: int, rounds: int) -> list[dict[str, Any]]:
    """Median milliseconds of a call; copies rotate through memory so that weights are cold."""
    made = layers(o, i, block)
    x = torch.randn(rows, i).bfloat16()
    turns: dict[str, Callable[..., None]] = {}
    for name, (module, size) in made.items():
        copies: list[nn.Module] = [copy.deepcopy(module) for _ in range(max(2, COLD_BYTES // size // 4))]

        def run(at: int, copies: list[nn.Module] = copies) -> None:
            copies[at % len(copies)](x)

        turns[name] = run
    times: dict[str, list[float]] = {name: [] for name in made}
    with torch.no_grad():
        for at in range(rounds):
            for name, run in turns.items():
                start = time.perf_counter()
                run(at)
                times[name].append(time.perf_counter() - start)
    return [
        {
            "layer": f"{o}x{i}",
            "rows": rows,
            "form": name,
            "bytes": size,
            "ms": statistics.median(times[name][rounds // 4 :]) * 1e3,
        }
        for name, (_, size) in made.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--part", choices=("quality", "time", "all"), default="all")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.part in ("quality", "all"):
        results["quality"] = {"rows": quality(args.shared), "machine": machine_stamp()}
    if args.part in ("time", "all"):
        rows = [
            row
            for o, i, block in ((2048, 2048, 64), (2048, 2048, 128), (4096, 4096, 128))
            for count in (1, 16, 256)
            for row in timed(o, i, block, count, 40 if count < 256 else 12)
        ]
        for row in rows:
            print(row, flush=True)
        results["time"] = {"rows": rows, "machine": machine_stamp()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**results, "protocol": __doc__}, indent=1) + "\n")


if __name__ == "__main__":
    main()
