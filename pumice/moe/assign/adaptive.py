"""One expert for tokens that are sure, two for the others.

Legend: T tokens, E experts, G segments (sequences).
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import assign
from pumice.moe.plan import Plan
from pumice.moe.routing import RouteContext, Routing


@assign("adaptive", key="adaptive-gating-moe", paper="arXiv:2310.07188")
def adaptive(
    routing: Routing,
    context: RouteContext,
    *,
    margin: Annotated[float, "lead of the first expert from which it is enough"] = 0.1,
) -> Plan:
    """Top-1 where the first probability exceeds the second by more than `margin`, else top-2.

    Probabilities are the routing's weights over their sum. A margin of 0 is top-1 (but for ties), of 1 top-2. The
    paper's curriculum, which puts sentences of equal cost together, sorts them by `difficulty`. O(T E). The default
    margin is from memory.
    """
    if not 0 <= margin <= 1:
        raise PumiceError(f"margin={margin} is outside 0..1, a difference of probabilities.")
    share_TE = routing.probability_TE.detach()
    two_TE = select.topk(share_TE, 2) & (share_TE > 0)
    one_TE = select.topk(share_TE, 1) & (share_TE > 0)
    if share_TE.shape[1] > 1:
        value_T2, _ = select.largest(share_TE, 2)
        sure_T = value_T2[:, 0] - value_T2[:, 1] > margin
        two_TE = torch.where(sure_T[:, None], one_TE, two_TE)
    plan = Plan.mask(two_TE, routing.weight_TE, routing)
    return plan.renormalised() if routing.renormalise else plan


def difficulty(plan: Plan, context: RouteContext) -> Tensor:
    """Share of each sequence's tokens that have more than one expert, [G]: what the paper's curriculum sorts by.

    Raises:
        PumiceError: the context does not know the sequences.
    """
    segment_T = context.need("segment_T", "difficulty")
    many_T = (torch.bincount(plan.token_A, minlength=plan.tokens) > 1).float()
    size_G = torch.bincount(segment_T, minlength=context.segments).clamp_min(1)
    return many_T.new_zeros(size_G.shape[0]).index_add(0, segment_T, many_T) / size_G
