"""Mixture of experts: one layer of three exchangeable parts, router → assignment → experts."""

from pumice.moe.layer import MoE
from pumice.moe.model import aux_loss, layers, statistics, unused
from pumice.moe.plan import AnyPlan, DensePlan, MergePlan, Plan
from pumice.moe.routing import RouteContext, Routing

__all__ = [
    "AnyPlan",
    "DensePlan",
    "MergePlan",
    "MoE",
    "Plan",
    "RouteContext",
    "Routing",
    "aux_loss",
    "layers",
    "statistics",
    "unused",
]
