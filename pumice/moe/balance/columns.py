"""What several balance losses need: a token's probabilities expert by expert.

Legend: T tokens, E experts, G segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.core.errors import PumiceError
from pumice.moe.plan import AnyPlan
from pumice.moe.routing import RouteContext


def probabilities(plan: AnyPlan, who: str) -> Tensor:
    """The router's normalised weights [T, E]; slots of an expert are summed.

    Raises:
        PumiceError: the router offers candidates, so that there is no such matrix.
    """
    routing = plan.routing
    if routing is None or routing.candidate_TC is not None:
        raise PumiceError(f"balance={who!r} needs a router that scores all experts of every token.")
    return routing.probability_TE.unflatten(1, (routing.experts, -1)).sum(2)


def segment_of(plan: AnyPlan, context: RouteContext) -> tuple[Tensor, int]:
    """segment_T and how many there are; all tokens are one segment where nobody said."""
    if context.segment_T is not None:
        return context.segment_T, context.segments
    device = plan.importance_E.device
    return torch.zeros(plan.tokens, dtype=torch.int64, device=device), 1


def segment_means(value_TE: Tensor, segment_T: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """The mean of each segment's rows [G, E], and how many rows it has [G]."""
    size_G = torch.bincount(segment_T, minlength=segments)
    sum_GE = value_TE.new_zeros(size_G.shape[0], value_TE.shape[1]).index_add(0, segment_T, value_TE)
    return sum_GE / size_G.clamp_min(1)[:, None].to(value_TE.dtype), size_G
