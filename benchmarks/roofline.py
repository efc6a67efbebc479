"""Achieved rates against what the machine can do: every layout of one linear layer, 4096 x 4096 in bf16, weights out of cache.

A layout of n nonzeros times R rows does 2 n R operations and moves its stored bytes, x and y. Its roof is the lower of two, both
measured in turns with it, since the host gives more at one time than at another: those bytes at the rate at which this many
threads read 256 MiB (PyTorch's sum, or the dense kernel of Pumice), and operations at the rate of a dense product of
1024 x 1024 x 1024 in bf16. What zeros save is in the operations that are not counted: a sparse layer at 90 % that reaches half of
its roof may still be far faster than dense. Each point is the fastest backend; medians.

    python benchmarks/roofline.py             # writes benchmarks/results/roofline.json and roofline.png
    python benchmarks/roofline.py --quick     # a look, nothing is written
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import matvec
import torch
import torch.nn.functional as F

from pumice.core import dispatch
from pumice.core.dispatch import Call
from pumice.kernels.features import machine_stamp
from pumice.weights.layouts.base import Packed, pack

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results" / "roofline.json"
SIZE, GEMM = 4096, 1024
READ = 256 << 20
COLD = 512 << 20
MARKS = {"dense": "o", "bitmask": "s", "nm": "D", "csr-tiles": "^", "block": "v"}
COLOURS = {1: "#0f9488", 16: "#d97706", 64: "#7c3aed", 256: "#dc2626"}


def ceilings() -> dict[tuple[str, str], Callable[[], Any]]:
    """Reading by PyTorch and by the dense kernel, and a dense product: what every layout takes turns with."""
    numbers = torch.ones(READ // 4)
    x, w = torch.randn(GEMM, GEMM).bfloat16(), torch.randn(GEMM, GEMM).bfloat16()
    dense = pack(torch.ones(READ // 2 // SIZE, SIZE).bfloat16(), "dense")
    call = Call("linear", "dense", torch.bfloat16, "cpu", 1, dense.shape, {})
    found: dict[tuple[str, str], Callable[[], Any]] = {("read", "sum"): numbers.sum}
    found["flops", "dense"] = lambda: F.linear(x, w)
    for backend, reason in dispatch.candidates(call):
        if reason is None and backend.name == "decode":
            run, row = backend.prepare(dense, None), torch.ones(1, SIZE).bfloat16()
            found["read", "decode"] = functools.partial(run, row)
    return found


def points(rows: int, layers: dict[str, Packed], rounds: int, cold: int) -> list[dict[str, Any]]:
    """What each layer does, moves and takes, and its share of its roof in the same turns."""
    found = []
    control = ceilings()
    for name, packed in layers.items():
        samples = common.in_turns(
            control, [lambda name=name, packed=packed: matvec.ways(packed, rows, cold, name)], rounds
        )[0]
        ms = {key: statistics.median(values) for key, values in samples.items()}
        rate = READ / min(ms[key] for key in control if key[0] == "read") * 1e3
        product = 2 * GEMM**3 / ms["flops", "dense"] * 1e3
        best = min(ms.keys() - control.keys(), key=lambda key: ms[key])
        flops = 2 * int((packed.numbers != 0).sum()) * rows
        moved = packed.nbytes + 2 * rows * sum(packed.shape)
        share = max(moved / rate, flops / product) * 1e3 / ms[best]
        line = {"case": name, "layout": packed.layout, "rows": rows, "backend": best[1], "ms": round(ms[best], 4)}
        roof = {"read": round(rate), "product": round(product), "of_roof": round(share, 3)}
        found.append({**line, "flops": flops, "bytes": moved, **roof})
        print(f"{rows:3d} rows  {name:24s} {best[1]:8s} {ms[best]:8.3f} ms  {share:5.0%} of its roof", flush=True)
    return found


def draw(results: dict[str, Any]) -> Figure:
    """A panel for each number of threads: operations a second over operations a byte, with both roofs."""
    from matplotlib.figure import Figure

    runs = results["runs"]
    figure = Figure(figsize=(6 * len(runs), 5), layout="constrained")
    for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        rate, flops = run["ceilings"]["bytes"], run["ceilings"]["flops"]
        corner, wide = flops / rate, [0.3, 1000]
        axes.plot([wide[0], corner, wide[1]], [wide[0] * rate / 1e9, flops / 1e9, flops / 1e9], color="#374151")
        axes.annotate(f"{rate / 1e9:.0f} GB/s read", (1.6, 1.6 * rate / 1e9 * 0.6), fontsize=8)
        axes.annotate(f"{flops / 1e9:.0f} GFLOP/s, dense bf16", (corner * 1.1, flops / 1e9 * 1.08), fontsize=8)
        for point in run["points"]:
            at = point["flops"] / point["bytes"], point["flops"] / point["ms"] / 1e6
            filled = {} if point["layout"] != "dense" else {"markeredgecolor": "black", "markersize": 8}
            axes.plot(*at, MARKS[point["layout"]], color=COLOURS.get(point["rows"], "black"), alpha=0.8, **filled)
        for layout, mark in MARKS.items():
            axes.plot([], [], mark, color="#6b7280", label=layout)
        for rows in sorted({point["rows"] for point in run["points"]}):
            axes.plot([], [], "-", color=COLOURS.get(rows, "black"), label=f"{rows} row{'s' if rows > 1 else ''}")
        axes.set(xscale="log", yscale="log", xlabel="operations a byte moved", ylabel="GFLOP/s (zeros not counted)")
        axes.set_title(f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}")
        lowest = min(wide[0] * rate / 1e9, *(point["flops"] / point["ms"] / 1e6 for point in run["points"]))
        axes.set_ylim(lowest * 0.7, flops / 1e9 * 3)
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(fontsize=7, loc="lower right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing written")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    cold = COLD // (8 if args.quick else 1)
    # In the form that stands in memory and is read.
    layers = {name: common.forms(packed)[-1] for name, packed in matvec.cases(SIZE, torch.bfloat16).items()}
    runs = []
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        found = [
            line
            for rows in map(int, args.rows.split(","))
            for line in points(rows, layers, 2 if args.quick else 7, cold)
        ]
        roof = {
            name: statistics.median(line[key] for line in found)
            for name, key in (("bytes", "read"), ("flops", "product"))
        }
        print(f"{threads} threads: {roof['bytes'] / 1e9:.1f} GB/s, {roof['flops'] / 1e9:.0f} GFLOP/s", flush=True)
        runs.append({"threads": threads, "ceilings": roof, "points": found})
    if not args.quick:
        results = {"runs": runs, "machine": machine_stamp()}
        common.write(RESULTS, results, protocol=__doc__)
        draw(results).savefig(RESULTS.with_suffix(".png"), dpi=90)


if __name__ == "__main__":
    main()
