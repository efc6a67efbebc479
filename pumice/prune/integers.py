"""Training what integers are made of: levels and scales block by block, then the scales alone, end to end.

The two stages of GQSA (arXiv:2412.17560), from the description of its mechanism; each runs by itself. A weight is s·k:
`FakeInteger` keeps k as a real number u beside the scale s, and rounds it in the forward pass with a straight-through
gradient. Group sizes, bits, zero points and which groups are missing are those of the layer's grid and do not change.
Shapes: O outputs, I inputs, G groups of a row, C columns of a group.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pumice.core.calls import CallRecord, hidden_of
from pumice.core.errors import PumiceError
from pumice.core.progress import bar
from pumice.core.stream import Collect, Stream, Unit
from pumice.core.view import WeightView
from pumice.weights.grid import Grid, keep, kept, storable

Objective = Callable[[Any], Tensor]


class FakeInteger(nn.Module):
    """A parametrisation that makes a weight s·k from trainable levels u and relative changes of the scales.

    Weights that are zero with their whole group stay zero; with `free` one that was only rounded to zero may move again.
    """

    def __init__(self, view: WeightView, grid: Grid, free: bool) -> None:
        super().__init__()
        w_OI = view.read()
        self.view, self.bits, self.group = view, grid.bits, grid.group
        levels = grid.grouped(grid.levels(w_OI).float())
        if free and grid.group:
            mask = (levels != 0).any(-1, keepdim=True).expand_as(levels)
        else:
            mask = levels != 0
        zero = float(1 << (grid.bits - 1)) if grid.zeros is None else grid.zeros[..., None].float()
        self.register_buffer("mask", mask.contiguous(), persistent=False)
        self.register_buffer("low", torch.zeros_like(grid.scales)[..., None] - zero, persistent=False)
        self.register_buffer("scales", grid.scales[..., None].clone(), persistent=False)
        self.zeros = grid.zeros
        self.levels = nn.Parameter(levels.clone())
        self.change = nn.Parameter(torch.zeros_like(grid.scales)[..., None])

    def integers(self) -> Tensor:
        """k [O, G, C], with the gradient of u where u is within the range."""
        low = self.get_buffer("low")
        top = low + float((1 << self.bits) - 1)
        u = torch.maximum(torch.minimum(self.levels, top), low)
        return (u + (u.round() - u).detach()) * self.get_buffer("mask")

    def forward(self, weight: Tensor) -> Tensor:
        w_OI = (self.integers() * self.get_buffer("scales") * (1 + self.change)).flatten(1)
        return (w_OI.t() if self.view.transposed else w_OI).reshape(weight.shape).to(weight.dtype)

    @torch.no_grad()
    def finish(self) -> tuple[Tensor, Grid]:
        """The rounded weight and its grid, with scales as they are stored."""
        scales = storable((self.get_buffer("scales") * (1 + self.change)).squeeze(-1))
        grid = Grid(self.bits, self.group, scales, self.zeros)
        return grid.matrix(self.integers().flatten(1).to(torch.int8), torch.float32), grid


def quantised_views(views: Sequence[WeightView]) -> list[tuple[WeightView, Grid]]:
    """The views whose weight lies on a grid that was kept with it.

    Raises:
        PumiceError: there are none.
    """
    found = []
    for view in views:
        grid = kept([view])
        if grid is not None and view.expert is None and grid.belongs(view.matrix()):
            found.append((view, grid))
    if not found:
        raise PumiceError("the model has no layer of integers: prune it with values=… first (values='int4').")
    return found


@contextmanager
def trainable(layers: Sequence[tuple[WeightView, Grid]], free: bool) -> Iterator[list[FakeInteger]]:
    """Put `FakeInteger` in front of the layers' weights; afterwards they hold what it made of them, and its grids."""
    made: list[FakeInteger] = []
    try:
        for view, grid in layers:
            made.append(FakeInteger(view, grid, free).to(view.tensor.device))
            parametrize.register_parametrization(view.module, view.parameter, made[-1], unsafe=True)
        yield made
    finally:
        for fake in made:
            weight, grid = fake.finish()
            parametrize.remove_parametrizations(fake.view.module, fake.view.parameter, leave_parametrized=False)
            fake.view.write(weight)
            keep(fake.view, grid)


def _descend(
    groups: list[dict[str, Any]],
    items: Sequence[Any],
    objective: Objective,
    steps: int,
    seed: int,
    left: Callable[[], bool],
) -> list[float]:
    """Adam over the items in random order, the rate falling to zero; the losses. Stops early when no time is left."""
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    rates = [group["lr"] for group in optimizer.param_groups]
    generator, order, losses = torch.Generator().manual_seed(seed), [], []
    with torch.enable_grad():
        for step in range(steps):
            if not left():
                break
            order = order or torch.randperm(len(items), generator=generator).tolist()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / steps)
            optimizer.zero_grad(set_to_none=True)
            loss = objective(items[order.pop()])
            if not torch.isfinite(loss):
                raise PumiceError(f"the loss became {float(loss)} after {step} steps: lower the learning rate.")
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def _clock(minutes: float | None) -> Callable[[], bool]:
    end = None if minutes is None else time.perf_counter() + 60 * minutes
    return lambda: end is None or time.perf_counter() < end


def tune_blocks(
    model: nn.Module,
    teacher: nn.Module,
    views: Sequence[WeightView],
    batches: Sequence[Any],
    *,
    steps: int = 64,
    lr_levels: float = 0.002,
    lr_scales: float = 1e-3,
    free: bool = True,
    minutes: float | None = None,
    seed: int = 0,
    progress: bool = True,
    compute: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Stage 1 (block quantisation-pruning optimisation): tune levels and scales of one block after the other.

    Each block, reading what the tuned blocks before it give, is drawn to what the dense model's block gives on the dense
    model's activations: mean squared error over the hidden state, Adam, one batch a step.

    Args:
        steps: for each block.
        lr_levels: of the levels, as a share of their range 2ᵇ; lr_scales: of the scales, relative to them.
        minutes: for all blocks together; later blocks are left as they are when it is up.

    Returns:
        blocks, steps, and the mean error of the first and last quarter of the steps, summed over the blocks.
    """
    layers = {view.name: (view, grid) for view, grid in quantised_views(views)}
    stream = Stream(model, [view for view, _ in layers.values()], batches, compute=compute)
    left, done = _clock(minutes), {"blocks": 0, "steps": 0, "before": 0.0, "after": 0.0}
    dense_states: list[list[Tensor]] = []
    teacher.eval()

    def visit(unit: Unit, collect: Collect) -> None:
        nonlocal dense_states
        if not unit.chained:
            dense_states = [[state.clone() for state in states] for states in collect.hidden]
        block = teacher.get_submodule(unit.name)
        dtype = collect.hidden[0][0].dtype
        if any(parameter.dtype != dtype for parameter in block.parameters()):
            # A model is trained in float32 beside a teacher that may be in half precision.
            block = copy.deepcopy(block).to(dtype)
        for index, records in enumerate(collect.calls):
            with stream.precision():
                dense_states[index] = [
                    hidden_of(record.call(block, state.clone()))
                    for record, state in zip(records, dense_states[index], strict=True)
                ]
        if left():
            own = [layers[view.name] for view in unit.views]
            losses = _fit_block(unit, own, collect, dense_states)
            quarter = max(1, len(losses) // 4)
            done["blocks"] += 1
            done["steps"] += len(losses)
            done["before"] += sum(losses[:quarter]) / quarter
            done["after"] += sum(losses[-quarter:]) / quarter
        shown.update()

    def _fit_block(
        unit: Unit, own: list[tuple[WeightView, Grid]], collect: Collect, targets: list[list[Tensor]]
    ) -> list[float]:
        def objective(item: tuple[CallRecord, Tensor, Tensor]) -> Tensor:
            record, state, target = item
            with stream.precision():
                found = hidden_of(record.call(unit.module, state.clone()))
            return (found.float() - target.float()).square().mean() / target.float().var().clamp(min=1e-12)

        items = [
            one
            for calls, states, wanted in zip(collect.calls, collect.hidden, targets, strict=True)
            for one in zip(calls, states, wanted, strict=True)
        ]
        with trainable(own, free) as made:
            groups = [
                {"params": [fake.levels for fake in made], "lr": lr_levels * (1 << own[0][1].bits)},
                {"params": [fake.change for fake in made], "lr": lr_scales},
            ]
            return _descend(groups, items, objective, steps, seed, left)

    with bar(len(stream.units), "tune blocks", enabled=progress, unit="block") as shown:
        stream.walk(visit)
    return done


def tune_scales(
    model: nn.Module,
    views: Sequence[WeightView],
    batches: Sequence[Any],
    objective: Objective,
    *,
    steps: int = 128,
    lr: float = 1e-3,
    minutes: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Stage 2 (end-to-end optimisation of the quantisation parameters): integers stand, only their scales are trained.

    Zero points stand too: they are integers here, and moving one by a step would move its whole group.

    Args:
        objective: loss of one batch.

    Returns:
        steps, parameters trained, and the mean loss of the first and last quarter of the steps.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    was_training = model.training
    model.eval()
    try:
        with trainable(quantised_views(views), free=False) as made:
            for fake in made:
                fake.levels.requires_grad_(False)
            scales = [fake.change for fake in made]
            losses = _descend([{"params": scales, "lr": lr}], list(batches), objective, steps, seed, _clock(minutes))
            count = sum(scale.numel() for scale in scales)
    finally:
        model.train(was_training)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    quarter = max(1, len(losses) // 4)
    before, after = (sum(part) / max(len(part), 1) for part in (losses[:quarter], losses[-quarter:]))
    return {"steps": len(losses), "trained": count, "before": before, "after": after}
