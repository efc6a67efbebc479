"""One linear layer, 4096 x 4096, weights out of cache: every sparse layout beside the best dense.

Copies of each weight are rotated through 512 MiB, so that weights come from memory as in a real model, and lie in huge pages
as `pack` puts them (dense ones too; oneDNN's own copies do not). Each layout takes turns with dense; medians. Dense is F.linear,
oneDNN with its own weight order and, for few rows, Pumice's own kernel; ratios are against the fastest of them in the same
turns.
The cost of a call beyond its kernel is that of a layer with hardly any weights, less the bare kernel call.

    python benchmarks/matvec.py                       # writes benchmarks/results/matvec.json
    python benchmarks/matvec.py --match block         # those cases anew, the others stay as they were measured
    python benchmarks/matvec.py --size 512 --quick    # a look, nothing is written
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

from pumice.core import dispatch, select
from pumice.core.dispatch import Call
from pumice.kernels.features import machine_stamp
from pumice.weights.layouts.base import Packed, pack
from pumice.weights.modules import SparseLinear

RESULTS = Path(__file__).parent / "results" / "matvec.json"
COLD_BYTES = 512 << 20
SKIPPED = ("unpack",)  # unpacks the whole matrix at every call: the fallback, never the choice


def cases(size: int, dtype: torch.dtype) -> dict[str, Packed]:
    """The layer dense, and with zeros in every layout that has a kernel."""
    w = torch.randn(size, size)
    made = {"dense": pack(w.to(dtype), "dense")}
    for density in (0.5, 0.3, 0.2, 0.1):
        made[f"bitmask, {1 - density:.0%} zeros"] = pack((w * select.layer(w.abs(), density)).to(dtype), "bitmask")
    for density in (0.5, 0.2, 0.1):
        mask = select.blocks(w.abs(), 16, 32, density)
        made[f"block 16x32, {1 - density:.0%} zeros"] = pack((w * mask).to(dtype), "block", r=16, c=32)
    for n, m in ((2, 4), (4, 8)):
        made[f"nm {n}:{m}"] = pack((w * select.n_of_m(w.abs(), n, m)).to(dtype), "nm", n=n, m=m)
    for density in (0.1, 0.05):
        made[f"csr, {1 - density:.0%} zeros"] = pack((w * select.layer(w.abs(), density)).to(dtype), "csr")
    return made


def rotation(packed: Packed, backend: dispatch.Backend, x: Tensor, cold: int) -> Callable[[], Tensor]:
    copies = common.copies(packed, max(2, -(-cold // max(packed.nbytes, backend.extra(packed)))))
    return common.rotated([backend.prepare(one, None) for one in copies], x)


def ways(
    packed: Packed, rows: int, cold: int, case: str, activations: str | None = None
) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """Every backend that runs the layer, each with copies of its own, by (case, backend); x may be rounded to `activations`."""
    x = torch.randn(rows, packed.shape[1]).to(packed.dtype)
    call = Call("linear", packed.layout, packed.dtype, "cpu", rows, packed.shape, packed.params, activations)
    wanted = [b for b, reason in dispatch.candidates(call) if reason is None and b.name not in SKIPPED]
    return {(case, backend.name): rotation(packed, backend, x, cold) for backend in wanted}


Times = dict[str, float]


def measure(rows: int, layers: dict[str, Packed], rounds: int, cold: int) -> dict[str, tuple[Times, Times]]:
    """Median milliseconds by backend of every case, and of dense in the same turns."""

    def medians(samples: dict[tuple[str, str], list[float]], wanted: str) -> Times:
        return {b: round(statistics.median(values), 4) for (name, b), values in samples.items() if name == wanted}

    names = [name for name in layers if name != "dense"]
    cases = [lambda name=name: ways(layers[name], rows, cold, name) for name in names]
    turns = common.in_turns(ways(layers["dense"], rows, cold, "dense"), cases or [dict], rounds)
    pooled = {key: [ms for samples in turns for ms in samples[key]] for key in turns[0] if key[0] == "dense"}
    dense = medians(pooled, "dense")
    found = {
        name: (medians(samples, name), medians(samples, "dense")) for name, samples in zip(names, turns, strict=False)
    }
    return {"dense": (dense, dense), **found}


def call_overhead(dtype: torch.dtype) -> dict[str, float]:
    """Microseconds that a sparse layer's call costs beyond its kernel, beside nn.Linear's whole call."""
    w = torch.zeros(16, 16)
    w[0, 0] = 1
    packed = pack(w.to(dtype), "bitmask")
    layer, dense = SparseLinear(packed), nn.Linear(16, 16, bias=False).to(dtype)
    backend = dispatch.choose(Call("linear", "bitmask", dtype, "cpu", 1, (16, 16), {}))
    kernel = backend.prepare(packed, None)
    inputs = {"2-D": torch.randn(1, 16).to(dtype), "3-D": torch.randn(1, 1, 16).to(dtype)}

    def micro(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(200):
            start = time.perf_counter()
            for _ in range(50):
                run()
            times.append((time.perf_counter() - start) / 50)
        return statistics.median(times) * 1e6

    with torch.no_grad():
        bare = micro(lambda: kernel(inputs["2-D"]))
        found = {f"{name}: layer beyond kernel": micro(lambda x=x: layer(x)) - bare for name, x in inputs.items()}
        found |= {"kernel call": bare, "nn.Linear call": micro(lambda: dense(inputs["2-D"]))}
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--match", default="", help="cases whose name contains this (dense is always measured)")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing written")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    dtype, cold = torch.bfloat16, COLD_BYTES // (16 if args.quick else 1)
    layers = {name: layer for name, layer in cases(args.size, dtype).items() if args.match in name or name == "dense"}
    results: list[dict[str, Any]] = []
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        for rows in map(int, args.rows.split(",")):
            times = measure(rows, layers, 2 if args.quick else 15, cold)
            for name, (found, beside) in times.items():
                dense = min(beside.values())
                best = min(found, key=lambda backend: found[backend])
                line = {"threads": threads, "rows": rows, "case": name, "ms": found, "best": best}
                # What the backend keeps beside the stored matrix: weights in another order, positions in another form.
                extra = dispatch.get("linear", layers[name].layout, best).extra(layers[name])
                sizes = {"bytes": layers[name].nbytes, "bytes_beside": extra}
                results.append({**line, "dense_ms": dense, "speedup": round(dense / found[best], 2), **sizes})
                print(
                    f"{threads} threads, {rows:3d} rows, {name:24s} {best:8s} {found[best]:8.3f} ms  {dense / found[best]:5.2f}x"
                )
    torch.set_num_threads(1)
    overhead = call_overhead(dtype)
    print("microseconds:", overhead)
    if not args.quick:
        content = {"what": __doc__, "size": args.size, "dtype": "bfloat16", "machine": machine_stamp()}
        whole = args.rows == parser.get_default("rows") and args.threads == parser.get_default("threads")
        if args.match or not whole:
            new = {(line["threads"], line["rows"], line["case"]): line for line in results}
            if args.match:
                new = {key: line for key, line in new.items() if line["case"] != "dense"}
            before = json.loads(RESULTS.read_text())["results"]
            results = [new.pop((line["threads"], line["rows"], line["case"]), line) for line in before] + [
                *new.values()
            ]
        RESULTS.write_text(json.dumps({**content, "results": results, "call_overhead_us": overhead}, indent=1) + "\n")


if __name__ == "__main__":
    main()
