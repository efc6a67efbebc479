"""Experts in clusters, some of each cluster asleep in training: MoEC.

Legend: T tokens, D model width, E experts, C clusters.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing


def check_clusters(clusters: int, experts: int, who: str) -> int:
    """`clusters` if it divides the experts; PumiceError otherwise."""
    if clusters < 1 or experts % clusters:
        raise PumiceError(f"clusters={clusters!r} of {who} must divide the {experts} experts.")
    return clusters


@router("clusters", key="moec", paper="arXiv:2207.09094", chance=True, trains=True, forbids=True)
class Clusters(Router):
    """softmax(W x), while in training a share of the experts of every cluster is left out; drawn anew now and then.

    Cluster c has the experts c E/C … (c + 1) E/C - 1. A token whose expert is asleep falls to a sibling, which balance
    `clusters` makes similar. At least one expert of each cluster stays awake; the same ones for all tokens, until
    `interval` training passes have gone by (250 in the authors' code). In evaluation all are awake. O(T D E).
    """

    awake_E: Tensor
    passes: Tensor

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        clusters: Annotated[int, "of equally many experts"] = 4,
        dropout: Annotated[float, "share of each cluster that is left out in training"] = 0.5,
        interval: Annotated[int, "training passes between two draws"] = 250,
    ) -> None:
        super().__init__(d_model, experts)
        self.clusters = check_clusters(clusters, experts, "router 'clusters'")
        if not 0 <= dropout < 1 or interval < 1:
            raise PumiceError(f"dropout={dropout!r} must be in [0, 1) and interval={interval!r} at least 1.")
        size = experts // clusters
        self.kept, self.interval = max(1, size - int(dropout * size)), interval
        self.weight_ED = nn.Parameter(torch.empty(experts, d_model))
        nn.init.trunc_normal_(self.weight_ED, std=(0.1 / d_model) ** 0.5)
        self.register_buffer("awake_E", torch.ones(experts, dtype=torch.bool))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        logits_TE = F.linear(x_TD, self.weight_ED)
        if not context.training:
            return Routing(logits_TE, logits_TE.softmax(1))
        if int(self.passes) % self.interval == 0:
            draw_CN = torch.rand(
                self.clusters, self.experts // self.clusters, device=x_TD.device, generator=context.generator
            )
            self.awake_E.copy_(select.topk(draw_CN, self.kept).flatten())
        self.passes += 1
        # A copy: a later draw must not change what the backward pass of this one reads.
        allowed_TE = self.awake_E.clone().expand_as(logits_TE)
        return Routing(logits_TE, logits_TE.masked_fill(~allowed_TE, -torch.inf).softmax(1), allowed_TE=allowed_TE)
