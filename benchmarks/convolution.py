"""The convolutions of ResNet-50 one by one, sparse and dense in turns, and what a nonzero of the sparse kernel costs.

Every shape of the network but its first layer, one image, with a ReLU behind, as `pumice.pack(example=...)` would run them. Zeros
are at random, or in groups of sixteen outputs of one input and tap (16x1). The kernels that multiply nonzeros alone (`taps`) or
eight outputs at a time (`bundles`) stand beside F.conv2d, oneDNN with the weight in its own order, and bundles of the dense weight.
Weights are rotated through 8 copies; x stays. Dense is the fastest of all that multiply every zero, in the same turns.
What a nonzero costs is the slope of the time over how many there are (10 % and 5 % of a 3x3 convolution with 256 channels of 14 x 14,
which has 222 places and 14 registers of sixteen); what is left at none is laying x out, and loading and storing sums. Beside it the
least it could cost: fp32 products at the rate of a dense product in the same turns.

    python benchmarks/convolution.py             # writes benchmarks/results/convolution.json
    python benchmarks/convolution.py --quick     # a look, nothing is written
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.core import dispatch
from pumice.core.convolution import Convolution
from pumice.kernels.features import machine_stamp
from pumice.weights.layouts.base import pack

RESULTS = Path(__file__).parent / "results" / "convolution.json"
COPIES, GEMM = 8, 1024
RELU = (0.0, float("inf"))
Shape = tuple[int, int, int, int, int]
"""Channels, outputs, kernel, stride, and rows of x."""


def shapes() -> dict[Shape, int]:
    """Those of ResNet-50 behind its first layer, and how often each is there."""
    found: dict[Shape, int] = {}
    channels = 64
    for inner, outputs, blocks, size in ((64, 256, 3, 56), (128, 512, 4, 28), (256, 1024, 6, 14), (512, 2048, 3, 7)):
        for block in range(blocks):
            stride = 2 if block == 0 and inner > 64 else 1
            layers = [
                (channels, inner, 1, 1, size * stride),
                (inner, inner, 3, stride, size * stride),
                (inner, outputs, 1, 1, size),
            ]
            for layer in [*layers, *([(channels, outputs, 1, stride, size * stride)] if block == 0 else [])]:
                found[layer] = found.get(layer, 0) + 1
            channels = outputs
    return found


GROUPS = "16x1"


def ways(shape: Shape, density: float, dtype: torch.dtype) -> dict[tuple[str, str], Callable[[], Any]]:
    """Every way to run it, by layout (or GROUPS) and backend."""
    channels, outputs, kernel, stride, size = shape
    inputs = channels * kernel**2
    weight = (torch.randn(outputs, inputs) * (torch.rand(outputs, inputs) < density)).to(dtype)
    kept = (torch.rand(outputs // 16, inputs) < density).repeat_interleave(16, 0)
    grouped, x = (torch.randn(outputs, inputs) * kept).to(dtype), torch.randn(1, channels, size, size).to(dtype)
    how = Convolution.of((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), (1, 1), clamp=RELU)
    found = {}
    for name, numbers in (("dense", weight), ("csr", weight), (GROUPS, grouped)):
        layout = "csr" if name == GROUPS else name
        copies = [pack(numbers.clone(), layout) for _ in range(COPIES)]
        call = dispatch.Call("conv2d", layout, dtype, "cpu", 1, copies[0].shape, how.params)
        for backend, reason in dispatch.candidates(call):
            if reason is None:
                bound = [backend.prepare(one, torch.zeros(outputs)) for one in copies]
                runs = [lambda x, run=run: run(x, how) for run in bound]
                for run in runs:
                    run(x)
                found[name, backend.name] = common.rotated(runs, x)
    return found


def layers(density: float, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for shape, count in shapes().items():
        samples = common.in_turns({}, [lambda shape=shape: ways(shape, density, dtype)], rounds)[0]
        ms = {key: statistics.median(values) for key, values in samples.items()}
        dense = min((key for key in ms if key[0] == "dense"), key=lambda key: ms[key])
        sparse = min((key for key in ms if key[0] == "csr"), key=lambda key: ms[key])
        groups = min((key for key in ms if key[0] == GROUPS), key=lambda key: ms[key])
        rows.append(
            {
                "shape": shape,
                "count": count,
                "ms": round(ms[sparse], 4),
                "backend": sparse[1],
                "groups_ms": round(ms[groups], 4),
                "groups_backend": groups[1],
                "dense_ms": round(ms[dense], 4),
                "dense": dense[1],
            }
        )
        print(
            f"{shape!s:28s} x{count}  {ms[sparse]:.3f} ms {sparse[1]}  groups {ms[groups]:.3f} {groups[1]}  "
            f"dense {ms[dense]:.3f} {dense[1]}  {ms[dense] / ms[sparse]:.2f}x {ms[dense] / ms[groups]:.2f}x",
            flush=True,
        )
    return rows


def nonzero(rounds: int) -> dict[str, float]:
    """Nanoseconds of a nonzero in fp32, its least, and microseconds that do not depend on them; one thread."""
    shape = (256, 256, 3, 1, 14)
    channels, outputs, kernel, _, size = shape
    places = (size - 1) * (size + kernel - 1) + size
    x, w = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
    control: dict[tuple[str, str], Callable[[], Tensor]] = {("dense", "product"): lambda: F.linear(x, w)}
    times, counts = [], []
    for density in (0.1, 0.05):
        samples = common.in_turns(control, [lambda density=density: ways(shape, density, torch.float32)], rounds)[0]
        ms = {key: statistics.median(values) for key, values in samples.items()}
        times.append(ms["csr", "taps"] * 1e6)
        counts.append(density * outputs * channels * kernel**2)
        # A register of sixteen numbers is 32 operations.
        register = 32 * ms["dense", "product"] * 1e6 / (2 * GEMM**3)
    slope = (times[0] - times[1]) / (counts[0] - counts[1])
    return {
        "registers": -(-places // 16),
        "ns": round(slope, 3),
        "least_ns": round(-(-places // 16) * register, 3),
        "rest_us": round((times[0] - slope * counts[0]) / 1e3, 1),
        "us_at_10_percent": round(times[0] / 1e3, 1),
        "product_gflops": round(32 / register, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing written")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    rounds = 2 if args.quick else 15
    runs = []
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            print(f"{threads} threads, {dtype}", flush=True)
            rows = layers(args.density, dtype, rounds)
            runs.append({"threads": threads, "dtype": str(dtype).removeprefix("torch."), "layers": rows})
    torch.set_num_threads(1)
    cost = nonzero(rounds)
    print(cost)
    if not args.quick:
        results = {"density": args.density, "runs": runs, "nonzero": cost, "machine": machine_stamp()}
        common.write(RESULTS, results, protocol=__doc__)


if __name__ == "__main__":
    main()
