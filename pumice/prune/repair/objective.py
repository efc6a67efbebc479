"""What a repair minimises: the task's loss, the distance from the dense model's outputs, and from its features."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.calls import call_model, hidden_of
from pumice.core.errors import PumiceError
from pumice.core.gradients import loss_of
from pumice.core.stream import find_units
from pumice.prune.repair.base import Job, output_of, relative_error


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


def guided_loss(ours_TV: Tensor, theirs_TV: Tensor, target_T: Tensor, task: float, distil: float) -> Tensor:
    """task · mean cross-entropy of the targets + distil · mean KL(theirs ‖ ours), in nats.

    One softmax of each serves value and gradient, since with a large vocabulary these passes take as long as the model.

    Args:
        ours_TV, theirs_TV: logits; no gradient flows to `theirs_TV`.
        target_T: int64, -100 for rows without a target.
    """
    return _Guided.apply(ours_TV, theirs_TV, target_T, task, distil)


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ours_TV: Tensor, theirs_TV: Tensor, target_T: Tensor, task: float, distil: float) -> Tensor:
        log_p = ours_TV.float().log_softmax(1)
        log_q = theirs_TV.float().log_softmax(1)
        rows_N = (target_T >= 0).nonzero().flatten()
        columns_N = target_T[rows_N]
        # An empty sum is zero: a batch of padding alone teaches nothing.
        share, part = task / max(rows_N.numel(), 1), distil / max(ours_TV.shape[0], 1)
        value = -share * log_p[rows_N, columns_N].sum()
        q = log_q.exp()
        value = value + part * (torch.dot(q.flatten(), log_q.flatten()) - torch.dot(q.flatten(), log_p.flatten()))
        ctx.save_for_backward(log_p, q, rows_N, columns_N)
        ctx.share, ctx.part, ctx.dtype = share, part, ours_TV.dtype
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        log_p, q, rows_N, columns_N = ctx.saved_tensors
        scale_T = torch.full((log_p.shape[0], 1), ctx.part, dtype=log_p.dtype, device=log_p.device)
        scale_T[rows_N] += ctx.share
        out = log_p.exp().mul_(scale_T).sub_(q, alpha=ctx.part)
        out[rows_N, columns_N] -= ctx.share
        return out.mul_(grad).to(ctx.dtype), None, None, None, None


class Objective:
    """Loss of one batch: task + distil·KL(dense ‖ model) + features·Σ over blocks of ‖f − f_dense‖²/‖f_dense‖².

    A model without a loss of its own (an encoder, a bare module) is trained towards the dense model's outputs.
    Features are compared at the blocks' outputs, without padding (SquareHead, arXiv:2310.06927). `logits` below 1 computes
    task and divergence at that share of a window's positions only, drawn at random, where the model takes
    `logits_to_keep`: with a large vocabulary and a small model the head is most of the work.
    """

    def __init__(
        self,
        model: nn.Module,
        job: Job,
        distil: float = 0.0,
        features: float = 0.0,
        task: float = 1.0,
        logits: float = 1.0,
    ) -> None:
        if not 0 < logits <= 1:
            raise PumiceError(
                f"logits={logits} must be above 0 and at most 1: the share of positions that are compared."
            )
        self.model, self.job, self.logits = model, job, logits
        self.distil, self.features, self.task = (distil, features, task) if job.teacher is not None else (0.0, 0.0, 1.0)
        names = [unit.name for unit in find_units(model, job.views)] if self.features else []
        self.blocks = [model.get_submodule(name) for name in names]
        self.dense = [job.teacher.get_submodule(name) for name in names] if job.teacher is not None else []
        self.generator = torch.Generator().manual_seed(job.seed)

    def __call__(self, batch: Any) -> Tensor:
        if self.job.loss is not None and not (self.distil or self.features):
            return loss_of(self.model, batch, self.job.loss)
        if not isinstance(batch, Mapping):
            return self.job.plain_loss(self.model, batch)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        positions = self._positions(inputs.get("input_ids"))
        if positions is not None:
            inputs["logits_to_keep"] = positions
        ours: list[Tensor] = []
        with outputs_of(self.blocks, ours):
            result = output_of(call_model(self.model, inputs))
        target, loss = self._target(batch, result, positions), None
        if self.job.teacher is not None and (self.distil or self.features or target is None):
            features: list[Tensor] = []
            with torch.no_grad(), outputs_of(self.dense, features):
                theirs = output_of(call_model(self.job.teacher, inputs))
            if target is None:
                loss = relative_error(result, theirs)
            else:
                loss = guided_loss(result.flatten(0, -2), theirs.flatten(0, -2), target, self.task, self.distil)
            mask = inputs.get("attention_mask")
            for mine, dense in zip(ours, features, strict=True):
                loss = loss + self.features * relative_error(*(_real(x, mask) for x in (mine, dense)))
        elif target is not None:
            loss = self.task * F.cross_entropy(result.flatten(0, -2).float(), target)
        return self.job.plain_loss(self.model, batch) if loss is None else loss

    def _positions(self, ids: Any) -> Tensor | None:
        """Which positions get logits, drawn anew for each batch; None for all, or where the model cannot choose."""
        if self.logits == 1 or not isinstance(ids, Tensor) or ids.dim() != 2 or not self._is_causal():
            return None
        for model in (self.model, self.job.teacher):
            if model is not None and "logits_to_keep" not in inspect.signature(model.forward).parameters:
                return None
        count = max(1, round(self.logits * ids.shape[1]))
        return torch.randperm(ids.shape[1], generator=self.generator)[:count].sort().values.to(ids.device)

    def _target(self, batch: Mapping[str, Any], result: Tensor, positions: Tensor | None) -> Tensor | None:
        """For each row of the flattened result the class it should name, -100 for none; None where the batch names none.

        A causal language model's rows should name the next token, and the last of a window nothing.
        """
        labels = batch.get("labels")
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor) and result.dim() == 3 and self._is_causal():
            target = torch.full_like(ids, -100)
            target[:, :-1] = (ids if labels is None else labels)[:, 1:]
            mask = batch.get("attention_mask")
            if mask is not None and mask.shape == ids.shape:
                target[:, :-1].masked_fill_(mask[:, 1:] == 0, -100)
            target = target if positions is None else target[:, positions]
            return target.flatten() if target.shape == result.shape[:2] else None
        if isinstance(labels, Tensor) and labels.dtype == torch.long and result.dim() == 2:
            return labels
        return None

    def _is_causal(self) -> bool:
        return type(self.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _real(x_BTD: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or x_BTD.shape[:2] != mask.shape:
        return x_BTD
    return x_BTD[mask.bool()]
