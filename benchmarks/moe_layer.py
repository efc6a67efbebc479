"""One MoE layer on the CPU: Transformers' implementations, the dense MLP of the same active FLOPs, and ours.

The layer is Mixtral-like (8 experts, 2 of them a token, d 1024, ff 3584), or has 64 small experts (8 a token, ff 512).
Several layers of weights, more than 512 MB in all, take turns, so that weights come from memory as in a real model.
Implementations take turns in one run. Of each: the median and the least wall-clock time, and the median CPU time of
all threads, which tells more where other processes run beside. `batched_mm` copies the weights of every
token's experts, so it is left out beyond 16 tokens. `floor_ms` says what bounds the layer: the
longer of the time to read the weights that are used, at the bandwidth measured in the same run (a sum over a large tensor), and
of the time of the products (three times as many with gradients), at the rate of a dense one of 2048 x 4096 x 4096
by PyTorch in the same run.

    python benchmarks/moe_layer.py --part bf16-few      # one part of PARTS into benchmarks/results/moe_layer.json
    python benchmarks/moe_layer.py --plot               # draws what is in the file
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import pumice  # noqa: F401  (registers the implementation)
from pumice.core import dispatch
from pumice.kernels import reference
from pumice.kernels.features import machine_stamp
from pumice.moe.grouped import expert_mlp
from pumice.moe.plan import Plan

RESULTS = Path(__file__).parent / "results" / "moe_layer.json"
COLD_BYTES = 512 << 20
SHAPES = {
    "mixtral": {"experts": 8, "top_k": 2, "d": 1024, "ff": 3584},
    "fine": {"experts": 64, "top_k": 8, "d": 1024, "ff": 512},
}
PARTS: dict[str, tuple[str, torch.dtype, tuple[int, ...], int]] = {
    "fp32-few": ("mixtral", torch.float32, (1, 16), 9),
    "bf16-few": ("mixtral", torch.bfloat16, (1, 16), 11),
    "fp32-256": ("mixtral", torch.float32, (256,), 7),
    "bf16-256": ("mixtral", torch.bfloat16, (256,), 9),
    "fp32-2048": ("mixtral", torch.float32, (2048,), 3),
    "bf16-2048": ("mixtral", torch.bfloat16, (2048,), 3),
    "fine": ("fine", torch.bfloat16, (16, 256), 7),
    "train-fp32": ("mixtral", torch.float32, (2048,), 4),
    "train-bf16": ("mixtral", torch.bfloat16, (2048,), 4),
}
Layer = tuple[Any, Tensor, Tensor]
"""MixtralExperts, and the dense MLP's matrices [2 k ff, d] and [d, k ff]."""


def make_layers(shape: dict[str, int], dtype: torch.dtype) -> list[Layer]:
    config = MixtralConfig(
        hidden_size=shape["d"],
        intermediate_size=shape["ff"],
        num_local_experts=shape["experts"],
        num_experts_per_tok=shape["top_k"],
    )
    size = 3 * shape["experts"] * shape["d"] * shape["ff"] * dtype.itemsize
    layers = []
    for _ in range(max(2, -(-COLD_BYTES // size))):
        experts = MixtralExperts(config).to(dtype)
        with torch.no_grad():
            for weight in experts.parameters():
                weight.normal_(0, weight.shape[2] ** -0.5)
        active = shape["top_k"] * shape["ff"]
        dense = (torch.randn(2 * active, shape["d"]) * 0.03, torch.randn(shape["d"], active) * 0.01)
        layers.append((experts, dense[0].to(dtype), dense[1].to(dtype)))
    return layers


def transformers_as(name: str) -> Callable[[Layer, Tensor, Tensor, Tensor], Tensor]:
    def run(layer: Layer, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        layer[0].config._experts_implementation = name
        return layer[0](x, index, weight)

    return run


def dense_mlp(layer: Layer, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    del index, weight
    gate, up = F.linear(x, layer[1]).chunk(2, -1)
    return F.linear(F.silu(gate) * up, layer[2])


def expert_loop(layer: Layer, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The specification in plain PyTorch, expert by expert, whose gradients are autograd's."""
    plan = Plan.top_k(index, weight, layer[0].num_experts)
    more = (plan.offsets_E1, plan.token_A, plan.weight_A)
    return reference.expert_mlp(x, layer[0].gate_up_proj, layer[0].down_proj, *more)


def operator_loop(layer: Layer, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Our two operators, whose gradients need fewer products and copies, each expert by expert in PyTorch (`looped`)."""
    plan = Plan.top_k(index, weight, layer[0].num_experts)
    plan.tap = lambda both: both
    return expert_mlp(x, layer[0].gate_up_proj, layer[0].down_proj, plan)


@contextmanager
def looped() -> Iterator[None]:
    """Grouped products have no backend but the loop."""
    kept = dict(dispatch._backends)
    for key in [key for key in kept if key[0].startswith("grouped_") and key[2] != "loop"]:
        del dispatch._backends[key]
    try:
        yield
    finally:
        dispatch._backends.update(kept)


def take_turns(
    runs: dict[str, Callable[..., Any]], layers: list[Layer], inputs: tuple[Tensor, Tensor, Tensor], rounds: int
) -> dict[str, dict[str, float]]:
    wall: dict[str, list[float]] = {name: [] for name in runs}
    work: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start, start_work = time.perf_counter(), time.process_time()
            run(layers[turn % len(layers)], *inputs)
            wall[name].append((time.perf_counter() - start) * 1e3)
            work[name].append((time.process_time() - start_work) * 1e3)
    return {
        name: {
            "ms": round(statistics.median(wall[name][1:]), 3),
            "least_ms": round(min(wall[name][1:]), 3),
            "cpu_ms": round(statistics.median(work[name][1:]), 3),
        }
        for name in runs
    }


def bandwidth() -> float:
    """Bytes a second of reading memory with all threads."""
    big = torch.ones(64 << 20)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        big.sum()
        times.append(time.perf_counter() - start)
    return big.nbytes / statistics.median(times)


def rate(dtype: torch.dtype) -> float:
    """Operations a second of a large dense product with all threads."""
    x, w = torch.randn(2048, 4096).to(dtype), torch.randn(4096, 4096).to(dtype)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        F.linear(x, w)
        times.append(time.perf_counter() - start)
    return 2 * 2048 * 4096**2 / statistics.median(times)


def floor(used: int, flops: int, read: float, speed: float) -> dict[str, Any]:
    """What bounds a layer, and the ceilings that were measured."""
    by_memory, by_products = used / read * 1e3, flops / speed * 1e3
    return {
        **{"bytes": used, "flops": flops, "bytes_per_second": round(read), "flops_per_second": round(speed)},
        "floor_ms": round(max(by_memory, by_products), 3),
        "floor_by": "memory" if by_memory > by_products else "products",
    }


def infer(part: str) -> list[dict[str, Any]]:
    name, dtype, counts, rounds = PARTS[part]
    shape = SHAPES[name]
    layers, read, speed = make_layers(shape, dtype), bandwidth(), rate(dtype)
    lines = []
    for tokens in counts:
        x = torch.randn(tokens, shape["d"]).to(dtype)
        weight, index = torch.randn(tokens, shape["experts"]).softmax(1).topk(shape["top_k"])
        inputs = (x, index, (weight / weight.sum(1, keepdim=True)).to(dtype))
        runs = {each: transformers_as(each) for each in ("eager", "grouped_mm", "pumice")}
        if tokens <= 16:
            runs["batched_mm"] = transformers_as("batched_mm")
        times = take_turns({**runs, "dense MLP": dense_mlp}, layers, inputs, rounds)
        used = index.unique().numel() * 3 * shape["d"] * shape["ff"] * dtype.itemsize
        flops = 6 * tokens * shape["top_k"] * shape["d"] * shape["ff"]
        lines.append(
            {
                **{"part": part, "layer": name, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens},
                **{"times": times, **floor(used, flops, read, speed), "machine": machine_stamp()},
            }
        )
    return lines


def train(part: str) -> list[dict[str, Any]]:
    name, dtype, (tokens,), rounds = PARTS[part]
    shape = SHAPES[name]
    layers = make_layers(shape, dtype)[:1]
    x = torch.randn(tokens, shape["d"]).to(dtype).requires_grad_()
    weight, index = torch.randn(tokens, shape["experts"]).softmax(1).topk(shape["top_k"])
    inputs = (x, index, weight.to(dtype).requires_grad_())

    def step(run: Callable[..., Tensor], within: Callable[[], Any] = nullcontext) -> Callable[..., None]:
        def both(layer: Layer, *inputs: Tensor) -> None:
            with within():
                run(layer, *inputs).float().square().mean().backward()
            for tensor in (*layer[0].parameters(), *inputs):
                tensor.grad = None

        return both

    dispatch.discover()
    runs = {each: step(transformers_as(each)) for each in ("eager", "grouped_mm", "pumice")}
    runs |= {"loop": step(expert_loop), "loop in our operators": step(operator_loop, looped)}
    with torch.enable_grad():
        times = take_turns(runs, layers, inputs, rounds)
    line = {"part": part, "layer": name, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "times": times}
    flops = 3 * 6 * tokens * shape["top_k"] * shape["d"] * shape["ff"]
    used = 3 * shape["experts"] * shape["d"] * shape["ff"] * dtype.itemsize
    return [{**line, **floor(used, flops, bandwidth(), rate(dtype)), "machine": machine_stamp()}]


def plot(lines: list[dict[str, Any]], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in lines if "train" not in line["part"]]
    figure, axes = pyplot.subplots(2, -(-len(lines) // 2), figsize=(2.6 * -(-len(lines) // 2), 6), squeeze=False)
    names = ("eager", "batched_mm", "grouped_mm", "dense MLP", "pumice")
    for axis, line in zip(axes.flat, lines, strict=False):
        shown = [name for name in names if name in line["times"]]
        colours = ["tab:blue" if name == "pumice" else "0.7" for name in shown]
        axis.bar(shown, [line["times"][name]["ms"] for name in shown], color=colours)
        axis.axhline(line["floor_ms"], color="tab:red", linewidth=1)
        axis.set_title(f"{line['layer']} {line['dtype']}\n{line['tokens']} tokens", fontsize=9)
        axis.set_ylabel("ms", fontsize=8)
        axis.tick_params(axis="x", rotation=60, labelsize=8)
        axis.tick_params(axis="y", labelsize=8)
    for axis in axes.flat[len(lines) :]:
        axis.axis("off")
    figure.suptitle(
        "One MoE layer, median time; the red line is the time that reading its weights, or its products, take at least",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--quick", action="store_true", help="nothing is written")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"results": []}
    for part in args.part:
        with torch.no_grad():
            lines = train(part) if part.startswith("train") else infer(part)
        for line in lines:
            times = {name: (time["ms"], time["least_ms"], time["cpu_ms"]) for name, time in line["times"].items()}
            print(part, line["tokens"], f"floor {line.get('floor_ms')}", times)
        content["results"] = [line for line in content["results"] if line["part"] != part] + lines
        content = {"what": __doc__, "shapes": SHAPES, "results": content["results"]}
        if not args.quick:
            RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    if args.plot:
        plot(content["results"], RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
