"""Precropping: a CNN gets its widths before it is trained.

Shapes: O outputs, I inputs (kernel positions included) of a layer.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from pumice.core import select
from pumice.core.calls import call_model, tensors
from pumice.core.errors import PumiceError
from pumice.core.gradients import model_stats
from pumice.core.registry import shrink
from pumice.core.stats import evaluating
from pumice.core.view import WeightView, find_views
from pumice.prune.shrink.base import Job, calibrated, example_of
from pumice.prune.shrink.budget import shares
from pumice.prune.trace import Group, explore, remove_all

SOURCES = ("synflow", "snip")


@shrink("precropping", key="precropping", paper="arXiv:2203.02549", needs=("gradient",))
def precropping(
    model: nn.Module,
    job: Job,
    *,
    source: Annotated[str, "where the layers' densities come from: synflow (no labels) or snip (a loss)"] = "synflow",
    rounds: Annotated[int, "steps in which synflow thins the network out"] = 100,
    initialise: Annotated[bool, "draw the weights of the smaller network anew"] = True,
) -> nn.Module:
    """Give every layer of a CNN the share of parameters that pruning at initialisation would leave it, as channels.

    A score (SynFlow or SNIP) selects single weights of the whole network at the density that is asked for; of that only
    the density d_l of each layer is kept. A layer loses inputs and outputs alike, so that its channels shrink by √d_l.
    Channels that a skip connection, a depthwise convolution or a concatenation ties together get one width, from the
    mean of their layers' densities weighted by parameters. A common factor is fitted so that the whole comes to the
    density asked for. Which channels stay does not matter: the smaller network is drawn anew and has to be trained.

    Checked against the abstracts only: that the layers' densities are taken from a method that prunes single weights, and
    that channels follow them. Doubt: the channel rule √d_l and how tied layers are averaged are from memory. The later
    version of the paper (PreCrop) finds the densities by convex optimisation instead, which is not done here.

    Raises:
        PumiceError: no convolutions, an unknown source, or (snip) no loss.
    """
    if source not in SOURCES:
        raise PumiceError(f"source={source!r} is unknown: write one of {', '.join(SOURCES)}.")
    if rounds < 1:
        raise PumiceError(f"rounds={rounds} must be at least 1.")
    if not any(isinstance(module, nn.Conv1d | nn.Conv2d) for module in model.modules()):
        raise PumiceError(f"{type(model).__name__} has no convolutions: precropping sets the widths of CNNs.")
    batches = calibrated("precropping", job)
    traced = explore(model, example_of(model, job))
    groups = [group for group in traced.groups if group.kind == "channel"]
    if not groups:
        raise PumiceError(f"{type(model).__name__} has no channels that could be taken out.")
    views = find_views(model)
    if source == "snip":
        gradients = model_stats(model, views, batches, frozenset(("gradient",)), job.loss)
        scores = {view.name: (view.read() * gradients[view.name]["gradient"]).abs() for view in views}
        density = _densities(scores, job.density)
    else:
        density = synflow_densities(model, views, batches[0], job.density, rounds)
    wanted = [max(_share(group, density, views), 1e-3) ** 0.5 for group in groups]
    counts = shares(model, groups, wanted, job, 1)
    remove_all(model, [(group, range(kept)) for group, kept in zip(groups, counts, strict=True)])
    if initialise:
        draw_anew(model, job)
    return model


def _densities(scores: dict[str, Tensor], density: float) -> dict[str, float]:
    """Share of each layer's weights among the best of all."""
    everything = torch.cat([score.flatten() for score in scores.values()])
    kept = select.topk(everything, select.keep_count(len(everything), density))
    parts = torch.split(kept, [score.numel() for score in scores.values()])
    return {name: float(part.float().mean()) for name, part in zip(scores, parts, strict=True)}


def synflow_densities(
    model: nn.Module, views: list[WeightView], batch: Any, density: float, rounds: int
) -> dict[str, float]:
    """Layer densities by SynFlow (arXiv:2006.05467): |w · ∂R/∂w| of the network of absolute weights fed with ones.

    R is the sum of its outputs. Round r of n keeps density^(r/n) of the weights and is scored on what the one before left;
    in one step whole layers would vanish. No data are looked at, only their shape.
    """
    names = [view.name for view in views]
    twin = copy.deepcopy(model).double()
    own = {view.name: view for view in find_views(twin)}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.abs_()
    ones = _ones(batch)
    found: dict[str, float] = dict.fromkeys(names, 1.0)
    for step in range(1, rounds + 1):
        scores = _flow(twin, [own[name] for name in names], ones)
        everything = torch.cat([scores[name].flatten() for name in names])
        kept = select.topk(everything, select.keep_count(len(everything), density ** (step / rounds)))
        parts = torch.split(kept, [own[name].numel for name in names])
        for name, part in zip(names, parts, strict=True):
            found[name] = float(part.double().mean())
            weight = own[name].matrix()
            own[name].write(weight * part.view(weight.shape))
    return found


def _flow(model: nn.Module, views: list[WeightView], ones: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    with torch.enable_grad(), evaluating(model):
        outputs = [t for t in tensors(call_model(model, ones)) if t.is_floating_point()]
        outputs[0].sum().backward()
    found = {}
    for view in views:
        gradient = view.tensor.grad
        assert gradient is not None, view.name
        found[view.name] = (view.as_matrix(gradient) * view.matrix()).abs()
    if not all(bool(torch.isfinite(score).all()) for score in found.values()):
        raise PumiceError("source='synflow': the flow overflows, which very deep networks do; take source='snip'.")
    return found


def _ones(value: Any) -> Any:
    """One sample of ones in the shape of a batch."""
    if isinstance(value, Tensor):
        return torch.ones_like(value[:1], dtype=torch.float64) if value.is_floating_point() else value[:1]
    if isinstance(value, dict):
        return {key: _ones(one) for key, one in value.items() if key != "labels"}
    return type(value)(map(_ones, value)) if isinstance(value, list | tuple) else value


def _share(group: Group, density: dict[str, float], views: list[WeightView]) -> float:
    """Mean density of the layers that make a group's units, depthwise ones too, weighted by their parameters."""
    sizes = {view.name: view.numel for view in views}
    layers = [member.name for member in group.members if member.role != "in" and member.name in density]
    total = sum(sizes[name] for name in layers)
    return sum(density[name] * sizes[name] for name in layers) / total if total else 1.0


def draw_anew(model: nn.Module, job: Job) -> None:
    """Initialise every layer as PyTorch does, from the job's seed; what knows no initialisation is named and kept."""
    kept = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        for name, module in model.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                kept.append(name)
    job.notes.append("the network is drawn anew: train it before use")
    if kept:
        job.notes.append(f"{', '.join(kept[:3])} know no initialisation of their own and keep the first values")
