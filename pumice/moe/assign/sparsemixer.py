"""SparseMixer: an expert is drawn, and the router learns from it what the other experts would have changed.

Legend: T tokens, E experts, K experts of a token.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import assign
from pumice.moe.plan import Plan
from pumice.moe.route.base import gumbel
from pumice.moe.routing import RouteContext, Routing


def near_best(logits_TE: Tensor, jitter: float) -> Tensor:
    """Logits with -inf for experts that a jitter of the logits by ± `jitter` could not make the best one."""
    best_T1 = logits_TE.detach().amax(1, keepdim=True)
    size_TE = torch.maximum(logits_TE.detach().abs(), best_T1)
    return logits_TE.masked_fill(best_T1 - logits_TE.detach() > 2 * jitter * size_TE, -torch.inf)


def estimate(share: Tensor, scale: Tensor) -> Tensor:
    """`scale · share`, with the gradient of `2 · share`.

    Let f(w) be the loss with weight w at the drawn expert. The exact gradient of E[f(p_D)] is Σ_i p_i f'(p_i) ∂p_i +
    Σ_i (f(p_i) - f(0)) ∂p_i, where f(0), the loss without any expert, is free to choose as Σ_i ∂p_i = 0. Writing the
    difference as an integral of f' over the weight and that as a sum over a few points makes both parts expectations
    of `2 f'(scale · p_D) ∂p_D` over the draw of the expert and of the scale.
    """
    return scale * share.detach() + 2 * (share - share.detach())


def drawn(
    routing: Routing, context: RouteContext, *, top_k: int, jitter: float, part: float, whole: float, best: bool
) -> Plan:
    """One expert after the other, each drawn in training from those not yet drawn and near the best of them.

    In training a weight is scaled by `part`, except with probability `whole`, and except for the best expert with
    `best`. Otherwise the best expert is taken, at its full weight.
    """
    if jitter <= 0:
        raise PumiceError(f"jitter={jitter} must be above 0: it says which experts can be drawn.")
    left_TE = routing.logits_TE
    if routing.allowed_TE is not None:
        left_TE = left_TE.masked_fill(~routing.allowed_TE, -torch.inf)
    experts, weights, possible = [], [], []
    for _ in range(top_k):
        near_TE = near_best(left_TE, jitter)
        best_T1 = select.largest(near_TE.detach(), 1)[1]
        possible.append(near_TE.detach().gather(1, best_T1) > -torch.inf)
        share_TE = near_TE.masked_fill(~possible[-1], 0.0).softmax(1)
        expert_T1 = best_T1
        if context.training:
            expert_T1 = select.largest(near_TE.detach() + gumbel(near_TE.detach(), context.generator), 1)[1]
        share_T1 = share_TE.gather(1, expert_T1)
        if context.training:
            coin_T1 = torch.rand(
                share_T1.shape, dtype=share_T1.dtype, device=share_T1.device, generator=context.generator
            )
            at_full_T1 = (coin_T1 < whole) | ((expert_T1 == best_T1) & best)
            share_T1 = estimate(share_T1, torch.where(at_full_T1, 1.0, part).to(share_T1.dtype))
        experts.append(expert_T1)
        weights.append(share_T1)
        left_TE = left_TE.scatter(1, expert_T1, -torch.inf)
    return _plan(routing, torch.cat(experts, 1), torch.cat(weights, 1), torch.cat(possible, 1))


def _plan(routing: Routing, expert_TK: Tensor, weight_TK: Tensor, possible_TK: Tensor) -> Plan:
    token_A, place_A = possible_TK.nonzero(as_tuple=True)
    expert_A, weight_A = expert_TK[token_A, place_A], weight_TK[token_A, place_A]
    return Plan.pairs(token_A, expert_A, weight_A, expert_TK.shape[0], routing.experts, routing)


@assign("sparsemixer", key="sparsemixer", paper="arXiv:2310.00811", chance=True)
def sparsemixer(
    routing: Routing,
    context: RouteContext,
    *,
    jitter: Annotated[float, "experts that a jitter of the logits by this share cannot make the best are out"] = 0.1,
    best: Annotated[bool, "the best expert always at its full weight, as in the paper"] = True,
) -> Plan:
    """One expert, drawn in training from the softmax of the logits; the router's gradient is corrected by the mid-point.

    Ordinary training keeps of the gradient only what comes through the weight of the chosen expert. Here the other
    part, what another choice would have changed, is estimated too: half of the draws run at half the weight and every
    gradient of the weight is doubled (see `estimate`). For a loss that is quadratic in the expert's output the
    expectation is exact with `best` off; with it on, draws of the best expert use the first-order (Euler) rule.

    Outside training the best expert at its weight. The router's logits alone count. A learned factor on the output,
    which the paper adds, is not here. O(T E).
    """
    return drawn(routing, context, top_k=1, jitter=jitter, part=0.5, whole=0.5, best=best)
