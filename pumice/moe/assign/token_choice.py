"""Each token picks its best experts.

Legend: T tokens, E experts, K experts of a token, C columns of the routing (E, or candidates).
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import assign
from pumice.moe.plan import Plan
from pumice.moe.routing import RouteContext, Routing

ORDERS = ("position", "priority")


def renormalised(weight_TK: Tensor) -> Tensor:
    """Each row divided by its sum."""
    return weight_TK / weight_TK.sum(1, keepdim=True).clamp_min(torch.finfo(weight_TK.dtype).tiny)


def limited(plan: Plan, capacity: float, k: int, order: str, rank_A: Tensor | None = None) -> Plan:
    """The plan with at most `ceil(capacity · T · k / E)` tokens an expert.

    "position" lets earlier tokens in first (all first choices before second ones, where `rank_A` says which choice an
    assignment was), "priority" the ones of largest weight.
    """
    room = math.ceil(capacity * plan.tokens * k / plan.experts)
    if order == "priority":
        return plan.limit(room, plan.weight_A.detach())
    first_A = -plan.token_A if rank_A is None else -(rank_A * plan.tokens + plan.token_A)
    return plan.limit(room, first_A)


@assign("token_choice", key="switch-transformer", paper="arXiv:2101.03961", columns=("experts", "candidates"))
def token_choice(
    routing: Routing,
    context: RouteContext,
    *,
    top_k: Annotated[int, "experts of a token"] = 2,
    capacity: Annotated[float | None, "slots of an expert over its fair share; none drops nothing"] = None,
    order: Annotated[str, "who gets the slots: position or priority"] = "position",
) -> Plan:
    """Every token goes to the `top_k` experts that score highest, with the routing's weights.

    Without a capacity nothing is dropped (MegaBlocks). With one, each expert takes `ceil(capacity · T · top_k / E)`
    tokens: in the order of positions, first choices before second ones (GShard, Switch), or by weight (V-MoE's
    batch-prioritised routing). What is refused contributes nothing. Experts that are not allowed are never chosen.
    O(T C).
    """
    if order not in ORDERS:
        raise PumiceError(f"order={order!r} is none of {', '.join(ORDERS)}.")
    columns = routing.weight_TE.shape[1]
    if not 1 <= top_k <= columns:
        raise PumiceError(f"top_k={top_k} is outside 1..{columns}, the experts a token can choose from.")
    score_TK, column_TK = select.largest(routing.score_TE, top_k)
    weight_TK = routing.weight_TE.gather(1, column_TK)
    possible_TK = None
    if routing.allowed_TE is not None:
        possible_TK = score_TK > -torch.inf
        weight_TK = weight_TK * possible_TK
    if routing.renormalise:
        weight_TK = renormalised(weight_TK)
    index_TK = column_TK if routing.candidate_TC is None else routing.candidate_TC.gather(1, column_TK)
    tokens = index_TK.shape[0]
    token_A = torch.arange(tokens, device=index_TK.device).repeat_interleave(top_k)
    rank_A = torch.arange(top_k, device=index_TK.device).repeat(tokens)
    expert_A, weight_A = index_TK.flatten(), weight_TK.flatten()
    if possible_TK is not None:
        kept_A = possible_TK.flatten()
        token_A, rank_A, expert_A, weight_A = (one[kept_A] for one in (token_A, rank_A, expert_A, weight_A))
    plan = Plan.pairs(token_A, expert_A, weight_A, tokens, routing.experts, routing)
    if capacity is None:
        return plan
    order_A = torch.argsort(expert_A * max(tokens, 1) + token_A, stable=True)
    return limited(plan, capacity, top_k, order, rank_A[order_A])
