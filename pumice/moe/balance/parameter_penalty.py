"""Small experts first: HMoE's penalty on activated parameters.

Legend: E experts.
"""

from __future__ import annotations

from torch import Tensor

from pumice.core.registry import balance
from pumice.moe.plan import AnyPlan
from pumice.moe.routing import RouteContext


@balance("parameter_penalty", key="hmoe", paper="arXiv:2408.10681", weight=0.1)
def parameter_penalty(plan: AnyPlan, context: RouteContext) -> Tensor:
    """E · Σ_e M_e P_e with M_e = share of tokens that go to e times e's size: what is penalised is activated parameters.

    Takes the place of loss `load`: with experts of one size it is that times the experts a token gets. Sizes are
    relative to their mean (the paper's are hidden sizes as numbers, which only scales the loss); P is the mean
    router probability, through which alone gradients flow. O(E).
    """
    asked_E = plan.asked_E.to(plan.probability_E.dtype) / max(plan.tokens, 1)
    size_E = asked_E.new_ones(plan.experts) if context.experts is None else context.experts.size_E.to(asked_E)
    return plan.experts * (asked_E * size_E * plan.probability_E).sum()
