"""Each expert picks its best tokens.

Legend: T tokens, E experts, N tokens of an expert.
"""

from __future__ import annotations

from typing import Annotated

import torch

from pumice.core import select
from pumice.core.registry import assign
from pumice.moe.plan import Plan
from pumice.moe.routing import RouteContext, Routing


@assign("expert_choice", key="expert-choice-routing", paper="arXiv:2202.09368", causal=False, balanced=True)
def expert_choice(
    routing: Routing, context: RouteContext, *, top_k: Annotated[int, "experts of a token, on average"] = 2
) -> Plan:
    """Every expert takes the T · top_k / E tokens that score highest for it (rounded down, one at least).

    Loads are equal by construction; a token may get any number of experts, none included. Which tokens an expert
    takes depends on the whole batch, later tokens included: not causal. The paper's variant with a limit of experts
    per token is not here. O(T E).
    """
    tokens, experts = routing.weight_TE.shape
    each = min(tokens, max(1, int(tokens * top_k / experts)))
    score_EN, token_EN = select.largest(routing.score_TE.t(), each)
    expert_EN = torch.arange(experts, device=token_EN.device)[:, None].expand_as(token_EN)
    possible_A = (score_EN > -torch.inf).flatten()
    token_A, expert_A = token_EN.flatten()[possible_A], expert_EN.flatten()[possible_A]
    plan = Plan.pairs(token_A, expert_A, routing.weight_TE[token_A, expert_A], tokens, experts, routing)
    return plan.renormalised() if routing.renormalise else plan
