"""Bias and norm correction: first moments and gains as in the dense model, in closed form.

Shapes: B batch, T tokens, D width, O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from pumice.core.calls import call_model
from pumice.core.registry import repair
from pumice.core.stats import evaluating
from pumice.core.stream import Collect, Stream, Unit, find_units
from pumice.core.view import WeightView
from pumice.prune.repair.base import Job

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@repair("correct", paper="arXiv:1906.04721; arXiv:2010.10732")
def correct(
    model: nn.Module,
    job: Job,
    *,
    biases: Annotated[bool, "set biases so that mean outputs are the dense model's"] = True,
    norms: Annotated[bool, "refit the gains of LayerNorm and RMSNorm, channel by channel"] = True,
    statistics: Annotated[bool, "measure BatchNorm's running statistics again"] = True,
    windows: Annotated[int, "calibration batches for the gains"] = 8,
) -> dict[str, Any]:
    """Bias and norm correction: no weight of the pruned layers changes.

    BatchNorm's running mean and variance are measured again. Biases: b += E[W_dense x_dense + b_dense] − E[W x + b], layer by
    layer in the order of execution, so that every mean output is the dense model's. Gains of other norms: with n what the
    norm makes of its input before the gain, g = Σ n·y_dense / Σ n² per channel, which is the least-squares gain. Biases
    and gains need the dense model; layers without a bias get none.
    """
    facts: dict[str, Any] = {}
    with torch.no_grad(), evaluating(model):
        if statistics:
            facts["batch_norms"] = _measure_again(model, job)
        if biases or norms:
            job.need_teacher("correct")
        if norms:
            facts["gains"] = _gains(model, job, windows)
        if biases:
            facts["biases"] = _biases(model, job)
    return facts


def _measure_again(model: nn.Module, job: Job) -> int:
    """Running statistics of every BatchNorm as the plain average over the calibration batches."""
    found = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    if not found:
        return 0
    momenta = [m.momentum for m in found]
    for module in found:
        module.reset_running_stats()
        module.momentum = None
        module.train()
    try:
        for batch in job.batches:
            with job.precision():
                call_model(model, batch)
    finally:
        for module, momentum in zip(found, momenta, strict=True):
            module.momentum = momentum
            module.eval()
    return len(found)


def _biases(model: nn.Module, job: Job) -> int:
    pairs = [(view, dense) for view, dense in job.teacher_views("correct") if _bias(view) is not None]
    if not pairs:
        return 0
    needs, wanted = frozenset({"input_mean"}), {view.name: dense for view, dense in pairs}
    means: dict[str, Tensor] = {}

    def remember(unit: Unit, collect: Collect) -> None:
        means.update({name: stats["input_mean"] for name, stats in collect(needs).items()})

    assert job.teacher is not None
    Stream(job.teacher, [dense for _, dense in pairs], job.batches, compute=job.compute).walk(remember)
    changed = 0

    def shift(unit: Unit, collect: Collect) -> None:
        nonlocal changed
        for views in collect.steps():
            stats = collect(needs, views)
            for view in views:
                if view.name in stats and view.name in means and job.clock.used < 1:
                    dense, bias = wanted[view.name], _bias(view)
                    offset = _bias(dense)
                    if bias is None or offset is None:
                        continue
                    target = _mean_output(dense, means[view.name]) + offset
                    bias.copy_(target - _mean_output(view, stats[view.name]["input_mean"]))
                    changed += 1

    Stream(model, [view for view, _ in pairs], job.batches, compute=job.compute).walk(shift)
    return changed


def _bias(view: WeightView) -> Tensor | None:
    return getattr(view.module, "bias", None) if view.expert is None else None


def _mean_output(view: WeightView, mean_GI: Tensor) -> Tensor:
    """W·E[x], group by group: [O]."""
    w_GOI = view.read().unflatten(0, (view.groups, -1))
    return torch.einsum("goi,gi->go", w_GOI, mean_GI).flatten()


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    """Every LayerNorm, RMSNorm or the like that has a gain per channel."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Norm") and getattr(getattr(module, "weight", None), "ndim", 0) == 1
    }


class _Done(Exception):
    pass


@contextmanager
def _outputs(modules: dict[str, nn.Module], found: dict[str, Tensor]) -> Iterator[None]:
    """What each module returns; the pass ends once all have."""

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found[name] = output.detach().float()
            if len(found) == len(modules):
                raise _Done

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield
    except _Done:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _gains(model: nn.Module, job: Job, windows: int) -> int:
    """Refit gains block by block, since a gain changes what the norms behind it read."""
    norms = _norms(model)
    owner = {
        name: next((u.name for u in find_units(model, job.views) if name.startswith(f"{u.name}.")), "")
        for name in norms
    }
    changed = 0
    # Norms outside the blocks mostly come last, behind them.
    for block in sorted(dict.fromkeys(owner.values()), key=lambda name: not name):
        inside = [name for name in norms if owner[name] == block]
        # Inside a block each norm reads what the ones before it changed.
        for name in inside:
            if job.clock.used >= 1:
                return changed
            changed += _refit_gain(model, job, name, windows)
    return changed


def _refit_gain(model: nn.Module, job: Job, name: str, windows: int) -> int:
    teacher = job.need_teacher("correct")
    ours, theirs = model.get_submodule(name), teacher.get_submodule(name)
    gain = ours.get_parameter("weight")
    offset, dense_offset = (getattr(module, "bias", None) for module in (ours, theirs))
    # Gemma's norms multiply with 1 + weight: told by what a unit weight does would need a call, so by name.
    shift = 1.0 if "Gemma" in type(ours).__name__ else 0.0
    product, square = torch.zeros_like(gain, dtype=torch.float64), torch.zeros_like(gain, dtype=torch.float64)
    for batch in job.batches[:windows]:
        pair = []
        for net, module, bias in ((model, ours, offset), (teacher, theirs, dense_offset)):
            found: dict[str, Tensor] = {}
            with job.precision(), _outputs({name: module}, found):
                call_model(net, batch)
            if name not in found:
                return 0
            pair.append((found[name] - (0 if bias is None else bias)).flatten(0, -2))
        ours_TD, theirs_TD = pair
        product += (ours_TD * theirs_TD).sum(0)
        square += ours_TD.square().sum(0)
    ratio = torch.where(square > 0, product / square.clamp(min=1e-30), torch.ones_like(square))
    gain.copy_(((gain + shift) * ratio) - shift)
    return 1
