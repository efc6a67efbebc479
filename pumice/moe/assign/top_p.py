"""As many experts as it takes to reach a probability.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import assign
from pumice.moe.assign.token_choice import ORDERS
from pumice.moe.plan import Plan
from pumice.moe.routing import RouteContext, Routing


def smallest_prefix(share_TE: Tensor, p: float) -> Tensor:
    """Mask of each row's fewest largest entries whose sum is at least p."""
    value_TE, column_TE = select.largest(share_TE, share_TE.shape[1])
    before_TE = value_TE.cumsum(1) - value_TE
    return torch.empty_like(share_TE, dtype=torch.bool).scatter_(1, column_TE, before_TE < p)


@assign("top_p", key="dynamic-top-p-moe-routing", paper="arXiv:2403.07652")
def top_p(
    routing: Routing,
    context: RouteContext,
    *,
    p: Annotated[float, "probability that a token's experts have together, at least"] = 0.4,
    capacity: Annotated[float | None, "slots of an expert over the mean load; none drops nothing"] = None,
    order: Annotated[str, "who gets the slots: position or priority"] = "position",
) -> Plan:
    """Every token goes to the smallest set of experts whose probabilities sum to `p`: hard tokens get more experts.

    Probabilities are the routing's weights over their sum; the combine weights are the routing's own, not renormalised
    unless the router says so. Use the `entropy` loss beside the load balance, or the router switches everything on.
    XMoE is the same with many small experts, p 0.9 and a capacity, `ceil(capacity · assignments / E)` tokens an expert.
    A selection by biased or noisy scores (`select_TE`) is not taken into account. O(T E log E).
    """
    if not 0 < p <= 1:
        raise PumiceError(f"p={p} is outside (0, 1], a probability.")
    if order not in ORDERS:
        raise PumiceError(f"order={order!r} is none of {', '.join(ORDERS)}.")
    share_TE = routing.probability_TE.detach()
    mask_TE = smallest_prefix(share_TE, p) & (share_TE > 0)
    plan = Plan.mask(mask_TE, routing.weight_TE, routing)
    if capacity is not None:
        room = math.ceil(capacity * plan.token_A.shape[0] / plan.experts)
        plan = plan.limit(room, plan.weight_A.detach() if order == "priority" else -plan.token_A)
    return plan.renormalised() if routing.renormalise else plan
