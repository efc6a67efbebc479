"""DeepSeek's balance losses besides the one of experts: of groups of experts, and of each sequence.

Legend: T tokens, E experts, G groups of experts, S sequences.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from pumice.core.errors import PumiceError
from pumice.core.registry import balance
from pumice.moe.balance.columns import probabilities, segment_means, segment_of
from pumice.moe.plan import AnyPlan, Plan
from pumice.moe.routing import RouteContext


@balance("group_load", key="deepseekmoe", paper="arXiv:2401.06066", weight=0.05)
def group_load(
    plan: AnyPlan, context: RouteContext, *, groups: Annotated[int, "groups (devices) of equally many experts"] = 4
) -> Tensor:
    """Σ_g f_g P_g over groups of experts: f the mean of f_e = E · share of assignments, P the sum of probabilities.

    Balances devices and leaves experts of a device free; with one expert a group it is loss `load`, and 1 where groups
    are equal. Gradients flow through P only. O(E) beyond the probabilities.
    """
    experts = plan.experts
    if groups < 1 or experts % groups:
        raise PumiceError(f"groups={groups!r} of balance 'group_load' must divide the {experts} experts.")
    asked_E = plan.asked_E.to(plan.probability_E.dtype)
    share_E = asked_E / asked_E.sum().clamp_min(1e-30)
    f_G = experts * share_E.unflatten(0, (groups, -1)).mean(1)
    return (f_G * plan.probability_E.unflatten(0, (groups, -1)).sum(1)).sum()


@balance("sequence_load", key="deepseekmoe", paper="arXiv:2412.19437", weight=1e-4)
def sequence_load(plan: AnyPlan, context: RouteContext) -> Tensor:
    """Loss `load` of each sequence for itself, averaged over sequences: the small loss beside DeepSeek-V3's bias.

    Without segments all tokens are one sequence. O(T E).
    """
    probability_TE = probabilities(plan, "sequence_load")
    segment_T, segments = segment_of(plan, context)
    chosen_TE = chosen(plan, probability_TE)
    f_SE, size_S = segment_means(chosen_TE, segment_T, segments)
    p_SE, _ = segment_means(probability_TE, segment_T, segments)
    f_SE = f_SE / f_SE.sum(1, keepdim=True).clamp_min(1e-30)
    loss_S = probability_TE.shape[1] * (f_SE * p_SE).sum(1)
    return loss_S.sum() / (size_S > 0).sum().clamp_min(1)


def chosen(plan: AnyPlan, probability_TE: Tensor) -> Tensor:
    """How often each token goes to each expert [T, E]; soft plans use every expert by its probability."""
    if not isinstance(plan, Plan):
        return probability_TE.detach()
    flat = torch.bincount(plan.token_A * plan.experts + plan.expert_A, minlength=plan.tokens * plan.experts)
    return flat.view(-1, plan.experts).to(probability_TE.dtype)
