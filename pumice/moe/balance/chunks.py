"""Neighbouring tokens share their experts, so that a chunk of tokens needs few: BlockFFN's two losses.

Legend: T tokens, E experts, N chunks, L tokens of a chunk.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.core.errors import PumiceError
from pumice.core.registry import balance
from pumice.moe.balance.columns import probabilities, segment_of
from pumice.moe.plan import AnyPlan
from pumice.moe.routing import RouteContext


@balance("chunk_locality", key="blockffn", paper="arXiv:2507.08771", weight=0.05)
def chunk_locality(
    plan: AnyPlan, context: RouteContext, *, steepness: Annotated[float, "of the sigmoid"] = 100.0
) -> Tensor:
    """Binary cross-entropy between what neighbouring tokens of a sequence fire: BCE(σ(a s_t), target σ(a s_t-1)).

    s are the router's logits, σ(a s) is almost 1 where s > 0. Gradients flow through both. 0 for sequences of one
    token; the mean over all pairs and experts otherwise. O(T E).
    """
    if plan.routing is None:
        raise PumiceError("balance='chunk_locality' needs a plan that carries its routing.")
    segment_T, _ = segment_of(plan, context)
    s_TE = steepness * plan.routing.logits_TE
    pair_P = (segment_T[1:] == segment_T[:-1]).nonzero().flatten()
    if pair_P.numel() == 0:
        return s_TE.sum() * 0
    return F.binary_cross_entropy_with_logits(s_TE[pair_P + 1], s_TE[pair_P].sigmoid())


@balance("chunk_sparsity", key="blockffn", paper="arXiv:2507.08771", weight=0.05)
def chunk_sparsity(plan: AnyPlan, context: RouteContext, *, chunk: Annotated[int, "consecutive tokens"] = 8) -> Tensor:
    """Mean over experts and chunks of 1 - Π (1 - p_te): the share of experts that a chunk of tokens would use.

    p are the token's normalised weights. Sequences are cut into chunks of `chunk` tokens, the last one may be
    shorter. O(T E).
    """
    if chunk < 1:
        raise PumiceError(f"chunk={chunk!r} of balance 'chunk_sparsity' must be above 0.")
    probability_TE = probabilities(plan, "chunk_sparsity")
    tokens, experts = probability_TE.shape
    if tokens == 0:
        return probability_TE.sum()
    segment_T, _ = segment_of(plan, context)
    chunk_T = chunks(segment_T, chunk)
    # A weight of 1 must leave a finite logarithm with a finite slope.
    silent_TE = torch.log1p(-probability_TE.clamp_max(1 - 1e-6))
    silent_NE = silent_TE.new_zeros(int(chunk_T[-1]) + 1, experts).index_add(0, chunk_T, silent_TE)
    return -torch.expm1(silent_NE).mean()


def chunks(segment_T: Tensor, length: int) -> Tensor:
    """Which chunk each token is of: 0, 1, …; a chunk ends after `length` tokens or where the segment changes."""
    place_T = torch.arange(segment_T.shape[0], device=segment_T.device)
    first_T = torch.ones_like(segment_T, dtype=torch.bool)
    first_T[1:] = segment_T[1:] != segment_T[:-1]
    start_T = torch.where(first_T, place_T, 0).cummax(0).values
    return ((place_T - start_T) % length == 0).cumsum(0) - 1
