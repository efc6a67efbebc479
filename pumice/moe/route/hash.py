"""Routing by a fixed hash of the token id: nothing is learned.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing

MASK = (1 << 32) - 1


def mixed(number: Tensor) -> Tensor:
    """A 32-bit integer hash (int64 in and out): every input bit moves about half of the output bits."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B & 0x7FFFFFFF)):
        number = number ^ (number >> shift)
        number = (number * factor) & MASK
    return number ^ (number >> 16)


@router("hash", paper="arXiv:2106.04426", needs=("token_ids_T",), gradient="none")
class Hash(Router):
    """Every token id has a fixed pseudo-random order of the experts and goes to the first of it, with equal weights.

    Hash Layers with a random hash: the same word always meets the same experts, so that loads are as even as the
    words' frequencies allow. Several experts a token are its first top_k, all different (the paper hashes several
    times instead). O(T E).
    """

    def __init__(self, d_model: int, experts: int, *, seed: Annotated[int, "chooses the hash"] = 0) -> None:
        super().__init__(d_model, experts)
        self.seed = seed

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        ids_T = context.need("token_ids_T", "router 'hash'").long()
        expert_E = torch.arange(self.experts, device=ids_T.device)
        start_T = mixed((ids_T + (self.seed * 0x9E3779B1)) & MASK)
        score_TE = mixed((start_T[:, None] + expert_E * 0x61C88647) & MASK).to(x_TD.dtype) / (MASK + 1)
        return Routing(score_TE, torch.ones_like(score_TE), select_TE=score_TE, renormalise=True)
