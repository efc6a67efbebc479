"""Tokens that pull an expert the wrong way are sent elsewhere: STGC.

Legend: T tokens, E experts, A assignments, F width of the hidden state.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.registry import balance
from pumice.moe.plan import AnyPlan, Plan
from pumice.moe.routing import RouteContext


def conflicting(gradient_AF: Tensor, expert_A: Tensor, experts: int, below: float) -> Tensor:
    """Mask [A]: cosine with the mean gradient of the assignment's expert is below `below`. Zero gradients never are."""
    gradient_AF = gradient_AF.float()
    sum_EF = gradient_AF.new_zeros(experts, gradient_AF.shape[1]).index_add(0, expert_A, gradient_AF)
    mean_AF = sum_EF[expert_A]
    length_A = torch.linalg.vector_norm(gradient_AF, dim=1) * torch.linalg.vector_norm(mean_AF, dim=1)
    return (length_A > 0) & ((gradient_AF * mean_AF).sum(1) < below * length_A)


def elimination_gradient(logits_TE: Tensor, token_A: Tensor, expert_A: Tensor, wrong_A: Tensor) -> Tensor:
    """Gradient by the logits of the mean over conflicting assignments of -log softmax(-logits)[expert]."""
    token_C, expert_C = token_A[wrong_A], expert_A[wrong_A]
    slope_CE = F.one_hot(expert_C, logits_TE.shape[1]).to(logits_TE.dtype) - (-logits_TE[token_C]).softmax(1)
    return torch.zeros_like(logits_TE).index_add(0, token_C, slope_CE / max(token_C.shape[0], 1))


class _Elimination(torch.autograd.Function):
    """The loss and a thread to the experts: its backward pass waits for the verdict that comes back along the thread."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, token_A: Tensor, expert_A: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits_TE, token_A, expert_A)
        return logits_TE.new_zeros(()), logits_TE.new_zeros(token_A.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None]:
        logits_TE, token_A, expert_A = ctx.saved_tensors
        factor, verdict_A = gradients
        assert factor is not None
        assert verdict_A is not None
        return factor * elimination_gradient(logits_TE, token_A, expert_A, verdict_A > 0), None, None


class _Watch(torch.autograd.Function):
    """Passes the hidden state through and, on the way back, says along the thread which assignments conflict."""

    @staticmethod
    def forward(ctx: Any, hidden_AF: Tensor, thread_A: Tensor, expert_A: Tensor, loss: GradientConflict) -> Tensor:
        ctx.save_for_backward(expert_A)
        ctx.loss = loss
        return hidden_AF.view_as(hidden_AF)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient_AF,) = gradients
        (expert_A,) = ctx.saved_tensors
        wrong_A = conflicting(gradient_AF, expert_A, ctx.loss.experts, ctx.loss.below)
        ctx.loss.conflicts = float(wrong_A.float().mean()) if wrong_A.numel() else 0.0
        return gradient_AF, wrong_A.to(torch.float32), None, None


@balance("gradient_conflict", key="stgc", paper="arXiv:2406.19905", weight=1.0, taps=True)
class GradientConflict(nn.Module):
    """-log softmax(-logits)[e] for the tokens whose gradient conflicts with the mean gradient of their expert e.

    A token's gradient in an expert is that of its first hidden state (what a bias there would get from this token);
    it conflicts where its cosine with the mean over the expert's tokens is below `below`. The loss lowers the logit of
    the present expert and raises the others. The tokens are known only in the backward pass, so the value is 0 in the
    forward pass and its gradient joins the same backward pass, exact for any factor on the losses; add the layer's
    `aux_loss` to the loss before `backward()`, as ever. `conflicts` is the share of assignments in the last one.

    0 for soft and merged plans. O(A F) more. That the authors use the gradient of the first layer's bias, and the
    inverted logits, are from memory.
    """

    def __init__(
        self, d_model: int, experts: int, *, below: Annotated[float, "cosine that is a conflict"] = 0.0
    ) -> None:
        super().__init__()
        self.experts, self.below, self.conflicts = experts, below, 0.0

    def forward(self, plan: AnyPlan, context: RouteContext) -> Tensor:
        routing = plan.routing
        if (
            not isinstance(plan, Plan)
            or routing is None
            or routing.candidate_TC is not None
            or not plan.token_A.numel()
        ):
            return plan.importance_E.new_zeros(())
        logits_TE = routing.logits_TE
        if not logits_TE.requires_grad:
            return logits_TE.new_zeros(())
        value, thread_A = _Elimination.apply(logits_TE, plan.token_A, plan.expert_A)
        before = plan.tap

        def watch(hidden_AF: Tensor) -> Tensor:
            hidden_AF = hidden_AF if before is None else before(hidden_AF)
            return _Watch.apply(hidden_AF, thread_A, plan.expert_A, self)

        plan.tap = watch
        return value
