"""What pruning would do, before it does it: layers, time, memory and disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pumice.core import dispatch
from pumice.core.dispatch import Call
from pumice.core.errors import PumiceError
from pumice.core.gradients import gradients_bytes
from pumice.core.stats import split_needs
from pumice.core.stream import find_units
from pumice.core.view import WeightView, find_views, matches, module_views
from pumice.engine.disk import empty_model
from pumice.engine.models import context_length, model_kind
from pumice.prune.allocate.cost import read_budget
from pumice.prune.axes import Axes, pattern_family

PROCESS_BYTES = 600_000_000
"""Python, PyTorch and Transformers themselves."""
OVERHEAD = 1.3
"""Norms, activations and bookkeeping beside the matrix products."""


BIG = 50_000_000
"""Parameters from which calibration in bf16 is worth its rounding."""


def compute_dtype(compute: str, model: nn.Module) -> torch.dtype:
    """dtype of the calibration's matrix products."""
    if compute in ("float32", "bfloat16"):
        return getattr(torch, compute)
    if compute != "auto":
        raise PumiceError(f"compute={compute!r} must be auto, float32 or bfloat16.")
    big = sum(p.numel() for p in model.parameters()) >= BIG
    on_gpu = any(p.is_cuda for p in model.parameters())
    native = on_gpu or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if big and native else torch.float32


@dataclass
class DryRun:
    """What `prune` would do. `seconds` is an estimate from rates measured on the spot; None where it cannot be known."""

    pruned: list[dict[str, Any]]
    kept: list[dict[str, Any]]
    seconds: float | None
    memory_bytes: int
    disk_bytes: int
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_run(model: nn.Module | str | Path, axes: Axes, samples: int, seqlen: int, compute: str) -> DryRun:
    """The plan of one pruning; reads no weights of a model given by name.

    Raises:
        PumiceError: as `prune` would, for whatever can be known beforehand.
    """
    notes: list[str] = []
    streamed = False
    if isinstance(model, nn.Module):
        net = model
    else:
        net, reason = empty_model(model)
        reason = reason or axes.whole_model
        streamed = reason is None
        notes.append(
            "streamed from disk to disk: one block is in memory at a time" if streamed else f"loaded whole: {reason}"
        )
    views = find_views(net, axes.targets, axes.ignore)
    axes.check_views(views)
    pruned = [{"name": v.name, "shape": v.shape_OI, "params": v.numel} for v in views]
    seconds = None
    if model_kind(net) == "causal-lm":
        seconds = _seconds(
            net, views, axes, samples, min(seqlen, context_length(net) or seqlen), compute_dtype(compute, net)
        )
    else:
        notes.append("time is estimated for language models only")
    memory, disk = _memory(net, views, axes, samples, samples * seqlen, streamed), _disk(net, views, axes)
    budget = read_budget(str(axes.allocation.values.get("budget", "")))
    if budget is not None and budget.unit != "density":
        notes.append(f"the budget of {budget.text} decides how much is kept: the disk is at most what is said here")
        disk = min(disk, int(budget.amount)) if budget.unit == "bytes" else disk
    return DryRun(pruned, _kept(net, views, axes), seconds, memory, disk, notes)


def _kept(model: nn.Module, views: list[WeightView], axes: Axes) -> list[dict[str, Any]]:
    chosen = {view.name for view in views}
    modules = {view.module_name for view in views}
    kept = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            kept.append({"name": name, "reason": "an embedding: only rows that occur are read"})
        elif any(view.name not in chosen for view in module_views(name, module)):
            if matches(name, axes.ignore):
                reason = f"ignore={','.join(axes.ignore)}"
            elif axes.targets is not None and name not in modules:
                reason = "not among the targets"
            else:
                reason = "shares its weight with another layer"
            kept.append({"name": name, "reason": reason})
    return kept


def _rate(run: Callable[[], Any], flops: float) -> float:
    """Operations per second, the better of two tries after one to warm up."""
    run()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return flops / min(times)


def _seconds(
    model: nn.Module, views: list[WeightView], axes: Axes, samples: int, seqlen: int, compute: torch.dtype
) -> float:
    needs, _ = split_needs(axes.needs)
    weights = sum(view.numel for view in views)
    size = 1024
    x, w = torch.randn(size, size).to(compute), torch.randn(size, size).to(compute)
    solve = torch.randn(size, size)
    total = weights / 2e8  # reading, scoring and selecting
    if axes.needs_data:
        linear = _rate(lambda: F.linear(x, w), 2 * size**3)
        heads = torch.randn(1, 8, size, 64).to(compute)
        attention = _rate(lambda: F.scaled_dot_product_attention(heads, heads, heads, is_causal=True), size**2 * 8 * 64)
        passes = 2 + (axes.allocation.name != "uniform") + ("drift" in needs)
        width = getattr(model.config, "hidden_size", 0)
        layers = getattr(model.config, "num_hidden_layers", 0)
        flops = 2.0 * weights * samples * seqlen
        total += OVERHEAD * passes * flops / linear
        more = axes.allocation.info.extras["passes"]
        if more is not None:
            forwards = more(axes.allocation.values, len(find_units(model, views)), len(views))
            total += OVERHEAD * forwards * 2.0 * weights * seqlen / linear
        total += passes * samples * layers * seqlen**2 * width / attention
    if "hessian" in needs:
        call = Call("gram", "dense", compute, "cpu", size, (size, size))
        gram = _rate(lambda: dispatch.choose(call).prepare(torch.zeros(size, size), None)(x.float()), 2 * size**3)
        shared = {(unit.name, view.shape_OI[1]) for unit in find_units(model, views) for view in unit.views}
        total += sum(2.0 * i * i * samples * seqlen for _, i in shared) * 1.5 / gram
        product = _rate(lambda: solve @ solve, 2 * size**3)
        total += sum(2.0 * o * i * i + 2.0 * i**3 for o, i in (view.shape_OI for view in views)) / product
        total += sum(view.shape_OI[1] for view in views) * 40e-6
    return total


def _memory(model: nn.Module, views: list[WeightView], axes: Axes, samples: int, tokens: int, streamed: bool) -> int:
    units = find_units(model, views)
    sizes = [sum(p.numel() * p.element_size() for p in unit.module.parameters()) for unit in units]
    everything = sum(p.numel() * p.element_size() for p in model.parameters())
    weights = everything - sum(sizes) + max(sizes) if streamed else everything
    width = getattr(getattr(model, "config", None), "hidden_size", 0) or 0
    activations = tokens * width * 4 * (1 + ("drift" in axes.needs)) if axes.needs_data else 0
    hessians = 0
    if "hessian" in axes.needs:
        hessians = max(sum({v.shape_OI[1]: v.shape_OI[1] ** 2 * 4 for v in unit.views}.values()) for unit in units) * 4
    whole = split_needs(axes.needs | axes.allocation.needs)[1]
    gradients = 3 * sum(p.numel() for p in model.parameters()) * 4 if whole else 0
    if "gradients" in axes.needs:
        gradients += gradients_bytes(views, samples)
    return PROCESS_BYTES + weights + activations + hessians + gradients + max(view.numel for view in views) * 4 * 6


def _disk(model: nn.Module, views: list[WeightView], axes: Axes) -> int:
    """Bytes of the checkpoint: the pattern's own layout or the bitmask, whichever is smaller, dense at most."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    family = pattern_family(axes.pattern)
    for view in views:
        o, i = view.shape_OI
        size: float = view.tensor.element_size()
        if axes.coding is not None:
            # Everything shrinks to its bits and its share of a scale of sixteen; then the zeros go.
            total -= round(o * i * size)
            size = axes.coding.bits / 8 + 2 / (axes.coding.group or i)
            total += round(o * i * size)
        values = round(o * i * axes.density * size)
        mask = o * -(-i // 8)
        if family in ("block", "row", "column"):
            mask = min(mask, 4 * round(o * i * axes.density / 16) + 4 * o)
        total -= max(0, round(o * i * size) - values - mask)
    return int(total)
