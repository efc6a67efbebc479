"""The batch as a whole uses all experts: σ-MoE's regulariser.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.core.errors import PumiceError
from pumice.core.registry import balance
from pumice.moe.plan import AnyPlan
from pumice.moe.routing import RouteContext


@balance("batch_entropy", key="sigma-moe-pkm-framework", paper="arXiv:2310.10837", weight=1e-3)
def batch_entropy(plan: AnyPlan, context: RouteContext) -> Tensor:
    """Minus the entropy of the batch's mean softmax of the logits, in nats: -log E when all experts are used alike.

    The softmax is taken whatever the router's own gate is. Gradients reach the logits of all tokens and experts.
    O(T E).
    """
    routing = plan.routing
    if routing is None or routing.candidate_TC is not None:
        raise PumiceError("balance='batch_entropy' needs a router that scores all experts of every token.")
    if routing.tokens == 0:
        return routing.logits_TE.sum()
    softmax_TE = routing.logits_TE.softmax(1).unflatten(1, (routing.experts, -1)).sum(2)
    return -torch.special.entr(softmax_TE.mean(0)).sum()
