"""The importance loss of the first sparsely gated layer.

Legend: E experts.
"""

from __future__ import annotations

from torch import Tensor

from pumice.core.registry import balance
from pumice.moe.plan import AnyPlan
from pumice.moe.routing import RouteContext


def squared_variation(value_E: Tensor) -> Tensor:
    """Squared coefficient of variation, 0 for zeros."""
    return value_E.var(unbiased=False) / value_E.mean().square().clamp_min(1e-10)


@balance("importance", key="sparsely-gated-moe", paper="arXiv:1701.06538", weight=0.1)
def importance(plan: AnyPlan, context: RouteContext) -> Tensor:
    """CV² of the combine weight that each expert gets over the batch.

    The paper does not say which variance; this is the biased one.
    """
    return squared_variation(plan.importance_E)
