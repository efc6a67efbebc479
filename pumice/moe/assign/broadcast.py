"""Tokens that the router is not sure of go to every expert while fine-tuning: GW-MoE.

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
from pumice.moe.plan import Plan
from pumice.moe.routing import RouteContext, Routing


def normalised_entropy(routing: Routing) -> Tensor:
    """H(p) / log E of each token's normalised weights, 0 for a firm choice, 1 for none; [T], without gradients."""
    experts = routing.weight_TE.shape[1]
    entropy_T = torch.special.entr(routing.probability_TE.detach()).sum(1)
    return entropy_T / math.log(experts) if experts > 1 else entropy_T


@assign("broadcast", key="gw-moe", paper="arXiv:2406.12375", trains=True)
def broadcast(
    routing: Routing,
    context: RouteContext,
    *,
    top_k: Annotated[int, "experts of a token"] = 2,
    uncertain: Annotated[float, "normalised entropy above which a token is broadcast in training"] = 0.95,
) -> Plan:
    """Token choice, but in training a token whose router entropy is above `uncertain` · log E goes to all its experts.

    So every expert learns what ambiguous tokens need, and in evaluation it matters less which one they get: there
    nothing changes and nothing costs more. Weights are the router's. The threshold is a setting of this project; the
    paper tunes one for each model. O(T E), and E experts' work for each broadcast token.
    """
    experts = routing.weight_TE.shape[1]
    if not 1 <= top_k <= experts:
        raise PumiceError(f"top_k={top_k} is outside 1..{experts}, the experts a token can choose from.")
    score_TE = routing.score_TE
    mask_TE = select.topk(score_TE, top_k)
    if context.training:
        mask_TE = mask_TE | (normalised_entropy(routing) > uncertain)[:, None]
    plan = Plan.mask(mask_TE & (score_TE > -torch.inf), routing.weight_TE, routing)
    return plan.renormalised() if routing.renormalise else plan
