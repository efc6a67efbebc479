"""Expert prototyping: k groups of experts, and one expert of each.

Legend: T tokens, E experts, K groups, N experts of a group.
"""

from __future__ import annotations

from typing import Annotated

import torch

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import assign
from pumice.moe.assign.token_choice import ORDERS, limited
from pumice.moe.plan import Plan
from pumice.moe.routing import RouteContext, Routing


@assign("prototype", key="m6-t-expert-prototyping", paper="arXiv:2105.15082")
def prototype(
    routing: Routing,
    context: RouteContext,
    *,
    top_k: Annotated[int, "groups, and so experts of a token"] = 2,
    capacity: Annotated[float | None, "slots of an expert over its fair share; none drops nothing"] = None,
    order: Annotated[str, "who gets the slots: position or priority"] = "position",
) -> Plan:
    """Every token goes to the best expert of each of `top_k` groups, E / top_k experts side by side: k top-1 routers.

    An expert's weight is the routing's divided by the sum over its group: with a softmax router just the softmax within
    the group. Capacity as in `token_choice`: `ceil(capacity · T · top_k / E)` tokens an expert. A group none of whose
    experts is allowed sends nothing. O(T E), without the k argmaxes in a row of top-k.
    """
    tokens, experts = routing.weight_TE.shape
    if order not in ORDERS:
        raise PumiceError(f"order={order!r} is none of {', '.join(ORDERS)}.")
    if top_k < 1 or experts % top_k:
        raise PumiceError(f"top_k={top_k} with {experts} experts: the groups must be equally large.")
    grouped_TKN = routing.weight_TE.view(tokens, top_k, experts // top_k)
    if routing.allowed_TE is not None:
        grouped_TKN = grouped_TKN * routing.allowed_TE.view(grouped_TKN.shape)
    share_TKN = grouped_TKN / grouped_TKN.sum(2, keepdim=True).clamp_min(torch.finfo(grouped_TKN.dtype).tiny)
    score_TKN = routing.score_TE.view(grouped_TKN.shape)
    mask_TKN = select.topk(score_TKN, 1) & (score_TKN > -torch.inf)
    plan = Plan.mask(mask_TKN.flatten(1), share_TKN.flatten(1), routing)
    return plan if capacity is None else limited(plan, capacity, top_k, order)
