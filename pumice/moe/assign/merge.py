"""No selection of tokens: the experts of a sequence are averaged into one.

Legend: T tokens, E experts, G groups (sequences or images), K experts of a group.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import assign
from pumice.moe.plan import MergePlan
from pumice.moe.routing import RouteContext, Routing


@assign("merge", key="meo", paper="arXiv:2310.09832", makes="merge", causal=False)
def merge(
    routing: Routing,
    context: RouteContext,
    *,
    top_k: Annotated[int | None, "experts that are merged; none merges all"] = None,
) -> MergePlan:
    """Every sequence or image runs through one expert, the average of its experts by the mean of its tokens' weights.

    All experts merged is SMEAR, the top_k of them MEO (sequence level; MEO's token attention is not here). An input of
    two axes is one sequence. Not causal within a sequence. One expert's work a token, plus O(G E) times the size of an
    expert for merging.
    """
    tokens, experts = routing.weight_TE.shape
    if top_k is not None and not 1 <= top_k <= experts:
        raise PumiceError(f"top_k={top_k} is outside 1..{experts}, the experts there are.")
    group_T = context.segment_T
    groups = max(context.segments, 1)
    if group_T is None:
        group_T = torch.zeros(tokens, dtype=torch.int64, device=routing.weight_TE.device)
    size_G = torch.bincount(group_T, minlength=groups).clamp_min(1)[:, None]
    weight_GE = _sums(routing.probability_TE if routing.renormalise else routing.weight_TE, group_T, groups) / size_G
    if top_k is not None:
        score_TE = routing.score_TE
        score_GE = _sums(score_TE.clamp_min(torch.finfo(score_TE.dtype).min / max(tokens, 1)), group_T, groups)
        kept_GE = select.topk(score_GE, top_k)
        weight_GE = weight_GE * kept_GE
        if routing.renormalise:
            weight_GE = weight_GE / weight_GE.sum(1, keepdim=True).clamp_min(1e-30)
    return MergePlan(weight_GE, group_T, routing=routing)


def _sums(value_TE: Tensor, group_T: Tensor, groups: int) -> Tensor:
    return value_TE.new_zeros(groups, value_TE.shape[1]).index_add(0, group_T, value_TE)
