"""What calibration spends its time on: the Gram matrix and attention, our kernels beside PyTorch's, and all of SparseGPT.

Shapes are those of SmolLM2-135M with one batch of calibration windows. Backends take turns in one run; medians.
Errors are the largest difference from float64 as a share of the largest value. PyTorch's switch for float32 products
that read bf16 (`fp32_precision = "bf16"`) is in the table too: its error shows whether this CPU heeds it.

    python benchmarks/calibration.py                       # writes benchmarks/results/calibration.json
    python benchmarks/calibration.py --shared ../shared    # and all of SparseGPT, with and without the two kernels
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pumice
from pumice.core import dispatch
from pumice.core.dispatch import Backend, Call
from pumice.kernels.features import machine_stamp

sys.path.insert(0, str(Path(__file__).parent))
from prune_quality import bf16_matmul, smollm2

RESULTS = Path(__file__).parent / "results" / "calibration.json"
Runs = dict[str, Callable[[], Tensor]]


def usable(call: Call) -> list[Backend]:
    return [backend for backend, reason in dispatch.candidates(call) if reason is None]


def interleaved(runs: Runs, rounds: int) -> dict[str, float]:
    """Median milliseconds of each."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: round(statistics.median(times[1:]), 3) for name, times in samples.items()}


def judged(runs: Runs, truth: Tensor, rounds: int, upper: bool) -> dict[str, dict[str, float]]:
    scale = truth.abs().max()
    found = {}
    for name, run in runs.items():
        wrong = (run().double() - truth).triu() if upper else run().double() - truth
        found[name] = {"error": float(f"{(wrong.abs().max() / scale).item():.2e}")}
    for name, ms in interleaved(runs, rounds).items():
        found[name]["ms"] = ms
    return found


def gram(tokens: int, width: int, rounds: int) -> dict[str, dict[str, float]]:
    """xᵀx in float32 and with bf16 inputs; each run starts from zero, so that its error is its own."""
    x = torch.randn(tokens, width)

    def fresh(backend: Backend) -> Callable[[], Tensor]:
        total = torch.zeros(width, width)
        run = backend.prepare(total, None)
        return lambda: (total.zero_(), run(x))[1]

    def torch_bf16() -> Tensor:
        with bf16_matmul(True):
            return x.t() @ x

    chosen = usable(Call("gram", "dense", torch.bfloat16, "cpu", tokens, (width, width)))
    runs: Runs = {f"pumice: {backend.name}": fresh(backend) for backend in chosen}
    runs["torch float32, whole matrix"] = lambda: x.t() @ x
    runs["torch reading bf16"] = torch_bf16
    return judged(runs, x.double().t() @ x.double(), rounds, upper=True)


def attention(batch: int, heads: int, tokens: int, features: int, rounds: int) -> dict[str, dict[str, float]]:
    q, k, v = (torch.randn(batch, heads, tokens, features).bfloat16() for _ in range(3))
    call = Call("attention", "dense", torch.bfloat16, "cpu", tokens, (tokens, features))
    runs: Runs = {}
    for backend in usable(call):
        run = backend.prepare((None, True), None)
        runs[f"pumice: {backend.name}" if backend.name != "torch" else "torch bf16"] = lambda run=run: run(q, k, v)
    a, b, c = (x.float() for x in (q, k, v))
    runs["torch float32"] = lambda: F.scaled_dot_product_attention(a, b, c, is_causal=True)
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    return judged(runs, truth, rounds, upper=False)


def sparsegpt(shared: Path) -> dict[str, float]:
    """Seconds to prune SmolLM2 at 50 % with and without the two kernels."""
    dense, calibration, _, _ = smollm2(shared)
    windows = calibration("0")
    native = [b for op in ("gram", "attention") for b in dispatch.backends(op) if b.name != "torch"]
    seconds = {}
    for name, refuse in (("with both kernels", None), ("without them", lambda call: "switched off to be compared")):
        for backend in native:
            dispatch.register(replace(backend, refuse=refuse) if refuse else backend)
        model = copy.deepcopy(dense)
        start = time.perf_counter()
        pumice.prune(model, "sparsegpt", density=0.5, data=windows, compute="bfloat16")
        seconds[name] = round(time.perf_counter() - start, 1)
        print(f"SparseGPT on SmolLM2-135M, 50 %, {name}: {seconds[name]} s", flush=True)
    for backend in native:
        dispatch.register(backend)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, help="also time all of SparseGPT on the data there")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    cases: dict[str, Any] = {
        f"gram, {tokens} tokens x {width}": gram(tokens, width, args.rounds)
        for tokens, width in ((4096, 576), (4096, 1536))
    }
    cases["attention, causal, 4 x 9 heads x 1024 tokens x 64"] = attention(4, 9, 1024, 64, args.rounds)
    for case, found in cases.items():
        for name, one in found.items():
            print(f"{case:52s} {name:32s} {one['ms']:9.2f} ms   error {one['error']:.1e}")
    content = {"what": __doc__, "machine": machine_stamp(), "threads": torch.get_num_threads(), "cases": cases}
    if args.shared:
        content["sparsegpt_seconds"] = sparsegpt(args.shared)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
