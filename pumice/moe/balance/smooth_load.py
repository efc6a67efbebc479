"""The load loss of the first sparsely gated layer, smooth thanks to the router's noise.

Legend: T tokens, E experts, K experts of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.core import select
from pumice.core.registry import balance
from pumice.moe.balance.importance import squared_variation
from pumice.moe.plan import AnyPlan
from pumice.moe.routing import RouteContext


def smooth_load_E(clean_TE: Tensor, deviation_TE: Tensor, noisy_TE: Tensor, k: int) -> Tensor:
    """Σ_x P(expert e is among the top k of x when its own noise is drawn again)."""
    if k >= clean_TE.shape[1]:
        return clean_TE.new_full((clean_TE.shape[1],), float(clean_TE.shape[0]))
    best_TK, _ = select.largest(noisy_TE, k + 1)
    # The k-th largest without e itself: the (k+1)-th of all where e is among the first k.
    inside_TE = noisy_TE >= best_TK[:, k - 1 : k]
    threshold_TE = torch.where(inside_TE, best_TK[:, k : k + 1], best_TK[:, k - 1 : k])
    return torch.special.ndtr((clean_TE - threshold_TE) / deviation_TE.clamp_min(1e-10)).sum(0)


@balance("smooth_load", key="sparsely-gated-moe", paper="arXiv:1701.06538", weight=0.1, router="noisy")
def smooth_load(plan: AnyPlan, context: RouteContext) -> Tensor:
    """CV² of the expected load under the router's noise, differentiable where counts are not.

    K is what a token gets on average. Without noise (outside training) it is the CV² of the counts.
    """
    assert plan.routing is not None
    cache = plan.routing.cache
    if "deviation_TE" not in cache:
        return squared_variation(plan.asked_E.to(plan.probability_E.dtype))
    k = max(1, round(float(plan.asked_E.sum()) / max(plan.tokens, 1)))
    return squared_variation(smooth_load_E(cache["clean_TE"], cache["deviation_TE"], plan.routing.logits_TE, k))
