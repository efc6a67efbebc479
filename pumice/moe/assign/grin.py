"""GRIN's gradient-informed top-k, SparseMixer-v2.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from typing import Annotated

from pumice.core.errors import PumiceError
from pumice.core.registry import assign
from pumice.moe.assign.sparsemixer import drawn
from pumice.moe.plan import Plan
from pumice.moe.routing import RouteContext, Routing


@assign("grin", key="grin-moe", paper="arXiv:2409.12136", chance=True)
def grin(
    routing: Routing,
    context: RouteContext,
    *,
    top_k: Annotated[int, "experts of a token"] = 2,
    jitter: Annotated[float, "experts that a jitter of the logits by this share cannot make the best are out"] = 0.1,
    best: Annotated[bool, "the best expert always at its full weight, as in the paper"] = True,
) -> Plan:
    """`top_k` experts drawn one after the other without replacement, each weighted by the softmax it was drawn from.

    The gradient estimate is SparseMixer's with a third-order rule instead of the mid-point: f(p) - f(0) = p (f'(p) +
    3 f'(p / 3)) / 4, so that 3/8 of the draws run at a third of the weight. For a loss that is cubic in the expert's
    output the expectation is exact with top_k 1 and `best` off. Outside training the best experts. The balance loss is
    the layer's. O(T E k).

    From memory: the share 5/8 of draws at full weight, which is what makes both parts of the gradient add up; the code
    released with the models has 1/4 and no doubling, that is only the part that comes from the choice.
    """
    if not 1 <= top_k <= routing.experts:
        raise PumiceError(f"top_k={top_k} is outside 1..{routing.experts}, the experts a token can choose from.")
    return drawn(routing, context, top_k=top_k, jitter=jitter, part=1 / 3, whole=0.625, best=best)
