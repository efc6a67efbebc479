"""Rectify-Router: tokens that found no room stay on their device, and empty slots are filled.

Legend: T tokens, E experts, A assignments, N slots of an expert, G devices.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import torch
from torch import Tensor

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import assign
from pumice.moe.assign.token_choice import token_choice
from pumice.moe.plan import Plan
from pumice.moe.routing import RouteContext, Routing


@assign("rectify", key="rectify-router", paper="arXiv:2402.12399", causal=False)
def rectify(
    routing: Routing,
    context: RouteContext,
    *,
    top_k: Annotated[int, "experts of a token, before it is rectified"] = 1,
    capacity: Annotated[float, "slots of an expert over its fair share"] = 1.0,
    devices: Annotated[int, "devices that hold E / devices experts and T / devices tokens each, in order"] = 1,
    stay: Annotated[bool, "tokens without room go to the best expert of their own device"] = True,
    fill: Annotated[bool, "empty slots go to the best tokens that did not choose the expert"] = True,
) -> Plan:
    """Token choice with a capacity, and what it wastes put to use.

    An assignment that an expert refuses goes to the best expert of the token's own device that it does not have yet,
    beyond that expert's capacity: this costs no exchange between devices. Then every expert with empty slots takes the
    tokens of highest score that it does not have. Only what neither can place counts as dropped. Weights are the
    routing's, renormalised if the router says so. O(T E).

    On one device, the default, every expert is near, so that nothing is refused in the end. Not causal: it depends on
    the whole batch. That a device's own experts take tokens beyond their capacity is how we read the paper.
    """
    tokens, experts = routing.weight_TE.shape
    if devices < 1 or experts % devices:
        raise PumiceError(f"devices={devices} with {experts} experts: each must hold equally many.")
    if capacity <= 0:
        raise PumiceError(f"capacity={capacity} must be above 0.")
    room = math.ceil(capacity * tokens * top_k / experts)
    chosen_TE = _mask(token_choice(routing, context, top_k=top_k))
    mask_TE = _mask(token_choice(routing, context, top_k=top_k, capacity=capacity))
    score_TE = routing.score_TE
    if stay:
        refused_T = (chosen_TE & ~mask_TE).sum(1)
        mask_TE = mask_TE | _best(score_TE.masked_fill(mask_TE | ~_home(score_TE, devices), -torch.inf), refused_T)
    if fill:
        free_E = (room - mask_TE.sum(0)).clamp_min(0)
        mask_TE = mask_TE | _best(score_TE.masked_fill(mask_TE, -torch.inf).t(), free_E).t()
    plan = Plan.mask(mask_TE, routing.weight_TE, routing)
    lost_T = (chosen_TE.sum(1) - mask_TE.sum(1)).clamp_min(0)
    lost_TE = _best(score_TE.masked_fill(mask_TE | ~chosen_TE, -torch.inf), lost_T)
    plan = dataclasses.replace(plan, wanted_E=plan.load_E + lost_TE.sum(0))
    return plan.renormalised() if routing.renormalise else plan


def _mask(plan: Plan) -> Tensor:
    return dataclasses.replace(plan, weight_A=torch.ones_like(plan.weight_A.detach())).combine_TE > 0


def _home(score_TE: Tensor, devices: int) -> Tensor:
    """Mask of the experts on each token's own device."""
    tokens, experts = score_TE.shape
    home_T = torch.arange(tokens, device=score_TE.device) * devices // max(tokens, 1)
    place_E = torch.arange(experts, device=score_TE.device) // (experts // devices)
    return home_T[:, None] == place_E


def _best(score_RC: Tensor, count_R: Tensor) -> Tensor:
    """Mask of the `count_R` largest entries of each row, never those of -inf."""
    most = min(int(count_R.max()), score_RC.shape[1]) if count_R.numel() else 0
    value_RN, column_RN = select.largest(score_RC, most)
    rank_N = torch.arange(most, device=score_RC.device)
    take_RN = (rank_N < count_R[:, None]) & (value_RN > -torch.inf)
    return torch.zeros_like(score_RC, dtype=torch.bool).scatter_(1, column_RN, take_RN)
