"""What a repair is given besides the model, and the training loop that several repairs share.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.calls import call_model
from pumice.core.errors import PumiceError
from pumice.core.gradients import loss_of
from pumice.core.progress import bar
from pumice.core.stats import evaluating
from pumice.core.view import WeightView

Loss = Callable[[nn.Module, Any], Tensor]

CHECKS = 8
"""How often the held-out loss is looked at during a training, at most."""
LOOKING = 0.1
"""Share of a budget of minutes that may go into looking."""
WARMUP = 0.05
"""Share of the budget over which the learning rate rises."""


class Clock:
    """How much of a budget of minutes is used up; without a budget, nothing ever is."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes, self.start = minutes, time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def used(self) -> float:
        """Share of the budget that has passed."""
        return 0.0 if self.minutes is None else self.seconds / (60 * self.minutes)


@dataclass
class Masked:
    """Which weights of one parameter are zero and stay so."""

    name: str
    parameter: Tensor
    mask: Tensor

    @torch.no_grad()
    def apply(self) -> None:
        """Put the zeros back."""
        self.parameter.mul_(self.mask)


@dataclass
class Job:
    """One repair: the sparse model's zeros, the data, the dense model where there is one, and the time there is.

    Args:
        views: weights that hold zeros; `masks` has one mask a parameter.
        batches: what the repair learns from.
        held_out: what it is judged by; never learnt from.
        teacher: the dense model, in eval mode, or None.
        loss: `f(model, batch)` for models that return no loss.
        compute: dtype of the matrix products; weights are float32 meanwhile.
        notes: what the user should know; methods append to it.
    """

    views: list[WeightView]
    batches: list[Any]
    held_out: list[Any]
    teacher: nn.Module | None = None
    loss: Loss | None = None
    clock: Clock = field(default_factory=lambda: Clock(None))
    compute: torch.dtype = torch.float32
    seed: int = 0
    progress: bool = True
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.masks = find_masks(self.views)

    def need_teacher(self, method: str) -> nn.Module:
        """The dense model; PumiceError where none was given."""
        if self.teacher is None:
            raise PumiceError(
                f"teacher=None: repair {method!r} compares with the dense model; pass teacher=… (--teacher MODEL)."
            )
        return self.teacher

    def teacher_views(self, method: str) -> list[tuple[WeightView, WeightView]]:
        """Each sparse weight beside the dense one of the same name; PumiceError where they do not correspond."""
        modules = dict(self.need_teacher(method).named_modules())
        pairs = []
        for view in self.views:
            module = modules.get(view.module_name)
            weight = getattr(module, view.parameter, None)
            if module is None or weight is None or weight.shape != view.tensor.shape:
                raise PumiceError(
                    f"teacher: it has no layer {view.module_name} of shape {tuple(view.tensor.shape)}: give the dense "
                    "model that this one was pruned from."
                )
            pairs.append(
                (
                    view,
                    WeightView(
                        view.name, view.module_name, module, view.parameter, view.expert, view.transposed, view.groups
                    ),
                )
            )
        return pairs

    def held_out_loss(self, model: nn.Module) -> float:
        """Mean loss on the held-out batches: what the model is trained for, or its distance from the teacher."""
        with torch.no_grad(), evaluating(model), self.precision():
            values = [float(self.plain_loss(model, batch)) for batch in self.held_out]
        return sum(values) / max(len(values), 1)

    def plain_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The model's own loss, or, for models that have none, its outputs' relative distance from the teacher's."""
        try:
            return loss_of(model, batch, self.loss)
        except PumiceError:
            if self.teacher is None:
                raise
        with torch.no_grad():
            theirs = output_of(call_model(self.teacher, batch))
        return relative_error(output_of(call_model(model, batch)), theirs)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Forward passes with matrix products in `compute`."""
        device = next((view.tensor.device.type for view in self.views), "cpu")
        with torch.autocast(device, torch.bfloat16, enabled=self.compute == torch.bfloat16):
            yield


def find_masks(views: Sequence[WeightView]) -> list[Masked]:
    """One mask a parameter: experts of one fused tensor share theirs."""
    found: dict[int, Masked] = {}
    for view in views:
        parameter = view.tensor
        found.setdefault(
            id(parameter), Masked(f"{view.module_name}.{view.parameter}", parameter.detach(), parameter.detach() != 0)
        )
    return list(found.values())


def output_of(result: Any) -> Tensor:
    """The tensor that a model is compared by: logits, or the last hidden state, or its only output."""
    for name in ("logits", "last_hidden_state"):
        value = getattr(result, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping | Sequence) and len(result):
        return output_of(next(iter(result.values())) if isinstance(result, Mapping) else result[0])
    raise PumiceError(f"the model returns a {type(result).__name__}: a repair needs a tensor, logits or hidden states.")


def relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """‖ours − theirs‖² / ‖theirs‖²."""
    ours, theirs = ours.float(), theirs.float()
    return (ours - theirs).square().sum() / theirs.square().sum().clamp(min=1e-20)


Objective = Callable[[Any], Tensor]


def train(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    objective: Objective,
    job: Job,
    *,
    lr: float,
    steps: int,
    batch: int,
    name: str,
) -> dict[str, Any]:
    """AdamW on `parameters` until `steps` or the clock run out; the best of a few held-out looks is what stays.

    The learning rate rises over 5 % of the budget and falls linearly to zero; the budget is whichever of steps and
    minutes is further used up, so that a run with minutes depends on the machine's speed.

    Args:
        objective: the loss of one batch of `job.batches`.
        batch: batches of the job whose gradients are summed for one step.

    Returns:
        steps taken, batches seen, the held-out losses in order.

    Raises:
        PumiceError: the loss is not finite.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = {id(parameter) for parameter in parameters}
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) in wanted)
    run = _Training(model, list(parameters), objective, job, lr, batch, name)
    try:
        with torch.enable_grad(), evaluating(model):
            return run.until(steps)
    finally:
        run.keep_best()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


class _Training:
    """The state of one `train`."""

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        objective: Objective,
        job: Job,
        lr: float,
        batch: int,
        name: str,
    ) -> None:
        self.model, self.parameters, self.objective, self.job = model, parameters, objective, job
        self.lr, self.batch, self.name = lr, batch, name
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
        self.generator = torch.Generator().manual_seed(job.seed)
        self.order: list[int] = []
        self.losses: list[float] = []
        self.best: list[Tensor] = []
        start = time.perf_counter()
        self.look()
        self.checks = CHECKS
        if job.clock.minutes is not None:
            affordable = LOOKING * 60 * job.clock.minutes / max(time.perf_counter() - start, 1e-9)
            self.checks = max(1, min(CHECKS, int(affordable)))

    def look(self) -> None:
        """Judge the model as it is by the held-out batches."""
        self.losses.append(self.job.held_out_loss(self.model))
        if self.losses[-1] <= min(self.losses):
            self.best = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def keep_best(self) -> None:
        for parameter, value in zip(self.parameters, self.best, strict=True):
            parameter.copy_(value)

    def until(self, steps: int) -> dict[str, Any]:
        step, looked, used = 0, 0, 0.0
        with bar(100, f"repair ({self.name})", enabled=self.job.progress, unit="%") as shown:
            while used < 1:
                self.step(self.lr * min(used / WARMUP + 0.05, (1 - used) / (1 - WARMUP), 1.0))
                step += 1
                used = max(self.job.clock.used, step / steps)
                shown.update(min(100, int(100 * used)) - shown.n)
                if used * self.checks >= looked + 1 or used >= 1:
                    looked = int(used * self.checks)
                    self.look()
        return {"steps": step, "batches": step * self.batch, "held_out": self.losses}

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(self.batch):
            if not self.order:
                self.order = torch.randperm(len(self.job.batches), generator=self.generator).tolist()
            with self.job.precision():
                value = self.objective(self.job.batches[self.order.pop()]) / self.batch
            if not torch.isfinite(value):
                raise PumiceError(f"repair {self.name!r}: the loss became {float(value)}; lower lr={self.lr:g}.")
            value.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        for masked in self.job.masks:
            masked.apply()
