"""Scratch-E and Scratch-B: is the value of a structured pruner its weights or its architecture?

After "Rethinking the Value of Network Pruning" (arXiv:1810.05270): a trained CNN is shrunk and fine-tuned; the shrunk
architecture is also drawn anew and trained for as many epochs as the dense model (Scratch-E) and for as many
multiplications (Scratch-B, proportionally more epochs). Beside it precropping, which chooses the widths before any training
and is trained for as many epochs. This is a way of judging, not of pruning, and therefore a benchmark and no method.

A small residual network on the shared subset of CIFAR-10 (6,000 training and 1,500 test images), SGD with momentum, cosine
learning rate, flips; means over seeds.

    python benchmarks/scratch.py --shared ../shared --epochs 12 --seeds 2
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.engine.shrink import shrink_result
from pumice.kernels.features import machine_stamp
from pumice.prune.shrink.base import Job
from pumice.prune.shrink.precropping import draw_anew

RESULTS = Path(__file__).parent / "results" / "scratch.json"


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm around a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.b1, self.b2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.c2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.short = short if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))) + self.short(x))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    stem = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def images(shared: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = np.load(shared / "data" / "cifar10" / "cifar10_sub6000_1500.npz")

    def pixels(name: str) -> Tensor:
        return (torch.from_numpy(data[name]).permute(0, 3, 1, 2).float() / 255 - 0.47) / 0.25

    labels = [torch.from_numpy(data[name]).long().flatten() for name in ("y_train", "y_test")]
    return pixels("x_train"), labels[0], pixels("x_test"), labels[1]


def multiplications(model: nn.Module, x: Tensor) -> int:
    """Multiplications of one sample in convolutions and linear layers."""
    total = 0

    def count(module: Any, args: Any, output: Tensor) -> None:
        nonlocal total
        total += module.weight[0].numel() * output[0].numel()

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.eval()(x[:1])
    for handle in handles:
        handle.remove()
    return total


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: float, seed: int, rate: float = 0.1) -> None:
    """SGD for a number of epochs that need not be whole."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = max(1, round(epochs * len(x) / 128))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    order = torch.randperm(len(x), generator=generator)
    at = 0
    for _ in range(steps):
        if at + 128 > len(order):
            order, at = torch.randperm(len(x), generator=generator), 0
        batch = order[at : at + 128]
        at += 128
        inputs = x[batch]
        flip = torch.rand(len(batch), generator=generator) < 0.5
        inputs = torch.where(flip[:, None, None, None], inputs.flip(-1), inputs)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), y[batch]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    return float(torch.cat([model(part).argmax(1) for part in x.split(500)]).eq(y).float().mean())


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    x, y, x_test, y_test = images(args.shared)
    table: dict[str, list[dict[str, float]]] = {}

    def note(label: str, model: nn.Module, epochs: float, start: float) -> None:
        row = {
            "accuracy": accuracy(model, x_test, y_test),
            "parameters": sum(p.numel() for p in model.parameters()),
            "multiplications": multiplications(model, x),
            "epochs": epochs,
            "seconds": time.perf_counter() - start,
        }
        table.setdefault(label, []).append(row)
        print(label, row, flush=True)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["input"]), batch["labels"])

    data = [{"input": x[:256], "labels": y[:256]}]
    for seed in range(args.seeds):
        start = time.perf_counter()
        dense = network(seed)
        full = multiplications(dense, x)
        train(dense, x, y, args.epochs, seed)
        note("dense", dense, args.epochs, start)
        for method in ("width", "flap"):
            options = {"allocation": "uniform"} if method == "flap" else {}
            small = copy.deepcopy(dense)
            shrink_result(small, {"name": method, "multiple": 1, **options}, density=args.density, data=data)
            note(f"{method}, no training", small, 0, time.perf_counter())
            fresh, longer = copy.deepcopy(small), copy.deepcopy(small)
            start = time.perf_counter()
            train(small, x, y, args.epochs / 3, seed, rate=0.03)
            note(f"{method}, fine-tuned", small, args.epochs / 3, start)
            ratio = full / multiplications(fresh, x)
            for label, model, epochs in (("Scratch-E", fresh, args.epochs), ("Scratch-B", longer, args.epochs * ratio)):
                draw_anew(model, Job(1.0, seed=seed + 100))
                start = time.perf_counter()
                train(model, x, y, epochs, seed)
                note(f"{method}, {label}", model, epochs, start)
        for source in ("synflow", "snip"):
            model = network(seed + 100)
            options = {"name": "precropping", "source": source}
            shrink_result(model, options, density=args.density, data=data, loss=loss, seed=seed)
            start = time.perf_counter()
            train(model, x, y, args.epochs, seed)
            note(f"precropping from {source}", model, args.epochs, start)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--density", type=float, default=0.4, help="share of the parameters inside the blocks that stays"
    )
    args = parser.parse_args()
    table = measure(args)
    rows = {
        label: {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]} for label, runs in table.items()
    }
    settings = {"epochs": args.epochs, "seeds": args.seeds, "density": args.density}
    RESULTS.parent.mkdir(exist_ok=True)
    found = {"protocol": __doc__, "settings": settings, "rows": rows, "runs": table, "machine": machine_stamp()}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
