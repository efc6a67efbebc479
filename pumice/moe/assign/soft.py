"""No selection at all: experts work on mixtures of tokens.

Legend: T tokens, E experts, G groups, L tokens of a group, S slots.
"""

from __future__ import annotations

from pumice.core.errors import PumiceError
from pumice.core.registry import assign
from pumice.moe.plan import DensePlan
from pumice.moe.routing import RouteContext, Routing


@assign(
    "soft",
    key="soft-moe",
    paper="arXiv:2308.00951",
    makes="dense",
    causal=False,
    balanced=True,
    forbids=False,
    columns=("experts", "slots"),
)
def soft(routing: Routing, context: RouteContext) -> DensePlan:
    """Slot inputs are softmax-over-tokens mixtures, token outputs softmax-over-slots mixtures of the slots' outputs.

    Each sequence or image is mixed for itself; an input of two axes is one. The logits decide, not the router's
    weights, and with router `slots` every expert has several. Fully differentiable, never drops, not causal.
    O(T S D).

    Raises:
        PumiceError: sequences of different lengths, or experts that are not allowed.
    """
    if routing.allowed_TE is not None:
        raise PumiceError("assign='soft' mixes every token into every slot: use a router that forbids none.")
    tokens, slots = routing.logits_TE.shape
    groups = 1 if context.segment_T is None else context.batch
    if groups is None:
        raise PumiceError("assign='soft' mixes equally long sequences: give x three axes instead of segment_T.")
    logits_GLS = routing.logits_TE.view(groups, tokens // groups if groups else 0, slots)
    return DensePlan(logits_GLS.softmax(1), logits_GLS.softmax(2), routing.experts, routing=routing)
