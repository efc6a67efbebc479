"""Keeps router logits small."""

from __future__ import annotations

from torch import Tensor

from pumice.core.registry import balance
from pumice.moe.plan import AnyPlan
from pumice.moe.routing import RouteContext


@balance("z", paper="arXiv:2202.08906", weight=1e-3)
def z(plan: AnyPlan, context: RouteContext) -> Tensor:
    """Mean over tokens of the squared log-sum-exp of the logits (ST-MoE): large logits lose precision."""
    return plan.z_loss
