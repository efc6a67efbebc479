"""Each token goes to every expert whose score is above a threshold.

Legend: T tokens, E experts, C columns of the routing (E, or candidates), A assignments.
"""

from __future__ import annotations

from typing import Annotated

import torch

from pumice.core import select
from pumice.core.registry import assign
from pumice.moe.plan import Plan
from pumice.moe.routing import RouteContext, Routing


@assign("threshold", key="remoe", paper="arXiv:2412.14711", columns=("experts", "candidates"))
def threshold(
    routing: Routing,
    context: RouteContext,
    *,
    above: Annotated[float, "scores strictly greater are selected"] = 0.0,
    least: Annotated[int, "experts that a token gets at least, its best ones"] = 0,
) -> Plan:
    """As many experts as have a score above `above`: the sparsity is the router's own, as in ReMoE.

    With a router whose weights are exactly 0 for most experts (ReLU) the plan is sparse and differentiable
    everywhere; with a softmax every expert is selected. O(T C).
    """
    score_TC = routing.score_TE
    mask_TC = select.above(score_TC, above)
    if least:
        mask_TC = mask_TC | (select.topk(score_TC, least) & (score_TC > -torch.inf))
    if routing.candidate_TC is None:
        plan = Plan.mask(mask_TC, routing.weight_TE, routing)
    else:
        token_A, column_A = mask_TC.nonzero(as_tuple=True)
        weight_A = routing.weight_TE[token_A, column_A]
        expert_A = routing.candidate_TC[token_A, column_A]
        plan = Plan.pairs(token_A, expert_A, weight_A, routing.tokens, routing.experts, routing)
    return plan.renormalised() if routing.renormalise else plan
