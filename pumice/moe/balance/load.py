"""The loss that keeps most MoE models balanced.

Legend: E experts, T tokens, A assignments.
"""

from __future__ import annotations

from torch import Tensor

from pumice.core.registry import balance
from pumice.moe.plan import AnyPlan
from pumice.moe.routing import RouteContext


@balance("load", key="switch-transformer", paper="arXiv:2101.03961", weight=0.01)
def load(plan: AnyPlan, context: RouteContext) -> Tensor:
    """E · Σ_e f_e P_e: the share of assignments an expert is asked for times its mean router probability.

    1 when both are uniform. f counts what tokens ask for, before a capacity refuses anything; gradients flow through P
    only.
    """
    asked_E = plan.asked_E.to(plan.probability_E.dtype)
    share_E = asked_E / asked_E.sum().clamp_min(1e-30)
    return plan.experts * (share_E * plan.probability_E).sum()
