"""Integers of eight bits with many rows: one layer beside dense int8 and dense bf16, and what rounding costs a real model.

One layer of 4096 x 4096, weights out of cache (copies rotate through 512 MiB), in turns; medians. Dense int8 is PyTorch's
dynamic quantisation in the fastest of its engines (x in float32, as it takes it), dense bf16 the faster of F.linear and oneDNN
with the weight in its own order. Pumice's rows are exact but for x in sixteen bits ("pairs"), or round x to eight bits a row
("bytes", `activations="int8"`), as PyTorch's does too. `error` is the distance from the product of the same x and weights in
float64, as a share of its norm; x has normal numbers.

The model (SmolLM2-135M-Instruct, bf16): a prompt of 256 tokens through the whole model in turns, and perplexity over 16 windows of
1024 tokens of the second half of Python's own documentation.

    python benchmarks/int8_rows.py                 # writes benchmarks/results/int8_rows.json
    python benchmarks/int8_rows.py --only layer
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import matvec
import quant_sparse
import torch
from torch import Tensor, nn

import pumice
from pumice.core import dispatch, select
from pumice.engine.models import demo_model, load_model
from pumice.kernels.features import machine_stamp
from pumice.weights.layouts.base import Packed, pack, unpack

RESULTS = Path(__file__).parent / "results" / "int8_rows.json"
SIZE, COLD_BYTES, ROUNDS = 4096, 512 << 20, 9
NAMES = ("decode", "pairs", "bytes")
PROMPT, SEQLEN, WINDOWS = 256, 1024, 16

Ways = dict[tuple[str, str], Callable[[], Any]]


def cases() -> dict[str, Packed]:
    """The layer whole, with zeros anywhere and with blocks of zeros."""
    w = torch.randn(SIZE, SIZE)
    made = {"int8, dense": quant_sparse.integers(w, "int8", "int8")}
    for density in (0.5, 0.2):
        gone = w * select.layer(w.abs(), density)
        made[f"int8, {1 - density:.0%} zeros"] = quant_sparse.integers(gone, "int8", "int8-bitmask")
    for density in (0.5, 0.2, 0.1):
        gone = w * select.blocks(w.abs(), 16, 32, density)
        made[f"int8, {1 - density:.0%} of 16x32 blocks"] = quant_sparse.integers(gone, "int8", "int8-block", r=16, c=32)
    return made


def torch_int8(rows: int) -> Ways:
    """PyTorch's dynamically quantised layer in each of its engines."""
    made: Ways = {}
    for engine in torch.backends.quantized.supported_engines:
        if engine in ("onednn", "x86", "fbgemm"):
            torch.backends.quantized.engine = engine
            held = [quant_sparse.torch_int8(SIZE) for _ in range(COLD_BYTES // SIZE**2)]
            made["int8, dense, PyTorch", engine] = common.rotated(held, torch.randn(rows, SIZE))
    return made


def ours(name: str, packed: Packed, rows: int) -> Ways:
    found = matvec.ways(packed, rows, COLD_BYTES, name, "int8")
    return {key: run for key, run in found.items() if key[1] in NAMES}


def error(y: Tensor, packed: Packed, x: Tensor) -> float:
    want = x.double() @ unpack(packed.astype(torch.float64)).double().t()
    return float(f"{(y.double() - want).norm() / want.norm():.2g}")


def layer(rows: int, layers: dict[str, Packed]) -> list[dict[str, Any]]:
    """Milliseconds of every way, dense int8 of PyTorch and dense bf16 in the same turns."""
    x = torch.randn(rows, SIZE).bfloat16()
    dense = pack(torch.randn(SIZE, SIZE).bfloat16(), "dense")
    control = {**torch_int8(rows), **matvec.ways(dense, rows, COLD_BYTES, "bf16, dense")}
    made = [lambda name=name, w=w: ours(name, w, rows) for name, w in layers.items()]
    lines: list[dict[str, Any]] = []
    turns = common.in_turns(control, made, ROUNDS)
    for samples in turns:
        medians = {key: statistics.median(values) for key, values in samples.items()}
        best = {kind: min(ms for (name, _), ms in medians.items() if name == kind) for kind, _ in control}
        for (name, backend), ms in medians.items():
            if (name, backend) in control and samples is not turns[0]:
                continue
            line: dict[str, Any] = {"case": name, "backend": backend, "ms": round(ms, 4)}
            line |= {f"of {kind}": round(value / ms, 2) for kind, value in best.items()}
            if name in layers:
                run = dispatch.get("linear", layers[name].layout, backend).prepare(layers[name], None)
                line["error"] = error(run(x), layers[name], x)
            lines.append(line)
            print(rows, line, flush=True)
    return lines


def model() -> list[dict[str, Any]]:
    """Perplexity and milliseconds of a prompt: dense, int8, and int8 with rounded activations."""
    loaded = load_model(demo_model(), dtype=torch.bfloat16)
    dense = loaded.model.eval()
    config: Any = dense.config
    ids = torch.randint(0, config.vocab_size, (1, PROMPT))
    batch = (1, PROMPT, SEQLEN)

    def packed(**options: Any) -> nn.Module:
        return pumice.pack(copy.deepcopy(dense), batch=batch, progress=False, **options)

    nets = {
        "bf16, PyTorch": dense,
        "bf16": packed(),
        "int8 weights": packed(values="int8"),
        "int8 weights and activations": packed(values="int8", activations="int8"),
    }
    runs = {name: lambda net=net: net(input_ids=ids, use_cache=False) for name, net in nets.items()}
    samples = common.in_turns(runs, [dict], ROUNDS)[0]
    lines = []
    for name, net in nets.items():
        found = pumice.evaluate(net, tokenizer=loaded.tokenizer, seqlen=SEQLEN, max_windows=WINDOWS, progress=False)
        kinds = sorted({one.backends.get(PROMPT, "torch") for one in pumice.describe(net).layers if one.backends})
        line = {"model": name, "perplexity": round(found.perplexity or 0.0, 3), "backends": kinds}
        lines.append({**line, "prompt_ms": round(statistics.median(samples[name]), 2)})
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", choices=("", "layer", "model"))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rows", default="16,64,256")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    results = common.read(RESULTS)
    if args.only != "model":
        layers = cases()
        runs = []
        for threads in map(int, args.threads.split(",")):
            torch.set_num_threads(threads)
            runs += [
                {"threads": threads, "rows": rows, "ways": layer(rows, layers)}
                for rows in map(int, args.rows.split(","))
            ]
        results["layer"] = {"size": SIZE, "runs": runs, "machine": machine_stamp()}
        common.write(RESULTS, results, protocol=__doc__)
    if args.only != "layer":
        torch.set_num_threads(max(map(int, args.threads.split(","))))
        results["model"] = {"rows": model(), "machine": machine_stamp()}
    common.write(RESULTS, results, protocol=__doc__)


if __name__ == "__main__":
    main()
