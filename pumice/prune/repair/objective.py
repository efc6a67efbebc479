"""What a repair minimises: the task's loss, the distance from the dense model's outputs, and from its features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.calls import call_model, hidden_of
from pumice.core.gradients import loss_of
from pumice.core.stream import find_units
from pumice.prune.repair.base import Job, divergence, output_of, relative_error


@contextmanager
def outputs_of(modules: list[nn.Module], found: list[Tensor]) -> Iterator[None]:
    """Collect what the modules return in the passes inside, in the order of execution."""

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(hidden_of(output))

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Objective:
    """Loss of one batch: task + distil·KL(dense ‖ model) + features·Σ over blocks of ‖f − f_dense‖²/‖f_dense‖².

    A model without a loss of its own (an encoder, a bare module) is trained towards the dense model's outputs.
    Features are compared at the blocks' outputs, without padding (SquareHead, arXiv:2310.06927).
    """

    def __init__(
        self, model: nn.Module, job: Job, distil: float = 0.0, features: float = 0.0, task: float = 1.0
    ) -> None:
        self.model, self.job = model, job
        self.distil, self.features, self.task = (distil, features, task) if job.teacher is not None else (0.0, 0.0, 1.0)
        names = [unit.name for unit in find_units(model, job.views)] if self.features else []
        self.blocks = [model.get_submodule(name) for name in names]
        self.dense = [job.teacher.get_submodule(name) for name in names] if job.teacher is not None else []

    def __call__(self, batch: Any) -> Tensor:
        if self.job.loss is not None and not (self.distil or self.features):
            return loss_of(self.model, batch, self.job.loss)
        if not isinstance(batch, Mapping):
            return self.job.plain_loss(self.model, batch)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        ours: list[Tensor] = []
        with outputs_of(self.blocks, ours):
            result = output_of(call_model(self.model, inputs))
        loss, theirs = self._task(batch, result), None
        if self.job.teacher is not None and (self.distil or self.features or loss is None):
            features: list[Tensor] = []
            with torch.no_grad(), outputs_of(self.dense, features):
                theirs = output_of(call_model(self.job.teacher, inputs))
            gap = relative_error(result, theirs) if loss is None else self.distil * divergence(result, theirs)
            loss = gap if loss is None else self.task * loss + gap
            mask = inputs.get("attention_mask")
            for mine, dense in zip(ours, features, strict=True):
                loss = loss + self.features * relative_error(*(_real(x, mask) for x in (mine, dense)))
        return self.job.plain_loss(self.model, batch) if loss is None else loss

    def _task(self, batch: Mapping[str, Any], result: Tensor) -> Tensor | None:
        """Cross-entropy of the next token, or of the labels; None where the batch names no target."""
        labels = batch.get("labels")
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor) and result.dim() == 3 and result.shape[:2] == ids.shape and self._is_causal():
            target = (ids if labels is None else labels)[:, 1:]
            mask = batch.get("attention_mask")
            if mask is not None and mask.shape == ids.shape:
                target = target.masked_fill(mask[:, 1:] == 0, -100)
            return F.cross_entropy(result[:, :-1].flatten(0, 1).float(), target.flatten())
        if isinstance(labels, Tensor) and labels.dtype == torch.long and result.dim() == 2:
            return F.cross_entropy(result.float(), labels)
        return None

    def _is_causal(self) -> bool:
        return type(self.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _real(x_BTD: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or x_BTD.shape[:2] != mask.shape:
        return x_BTD
    return x_BTD[mask.bool()]
