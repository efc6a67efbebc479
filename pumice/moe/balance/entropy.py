"""Entropy of routing, token by token.

Legend: T tokens.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from pumice.core.registry import balance
from pumice.moe.plan import AnyPlan
from pumice.moe.routing import RouteContext


@balance("entropy", key="limoe", paper="arXiv:2206.02770", weight=0.01)
def entropy(
    plan: AnyPlan, context: RouteContext, *, sign: Annotated[float, "1: tokens choose firmly, -1: broadly"] = 1.0
) -> Tensor:
    """Mean entropy of a token's normalised weights: minimised, tokens choose firmly.

    The local half of LIMoE's losses, for one modality; minimising it alone lets all tokens agree on one expert.
    """
    return sign * plan.entropy
