"""Retrieves a few of very many experts by product keys: PEER.

Legend: T tokens, D model width, E experts = M · N, H heads, K experts of a head, Q half the width of a key.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing

GATES = ("softmax", "relu")
NORMS = ("batch", "layer", "none")


@router("product_keys", key="peer", paper="arXiv:2407.04153", columns="candidates", trains=True)
class ProductKeys(Router):
    """Expert (i, j) has the key (c_i, c'_j); a head's query in two halves finds the K best keys among K · K sums.

    Each half is compared with √E sub-keys only, and the best K experts are exactly among the pairs of the best K of
    each half. The H heads share the sub-keys, and each has its own query; a head's weights are the softmax over its K
    experts (or ReLU of the scores, which the σ-MoE paper prefers), and an expert that two heads retrieve counts twice.
    Queries are normalised over the batch in training and by running statistics otherwise (`norm`).

    The routing has H · K candidate columns and never a matrix [T, E]: use assign `threshold`, which takes them all, and
    kind `neurons` with d_ff 1. E need not be a square: its two nearest factors are used. O(T H (D Q + √E Q + K²)).
    """

    mean_HQ: Tensor
    variance_HQ: Tensor

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        heads: Annotated[int, "independent retrievals"] = 8,
        keys: Annotated[int, "experts that each head retrieves"] = 16,
        d_key: Annotated[int | None, "width of a whole key, even; none is d_model / 2 or a little more"] = None,
        gate: Annotated[str, "softmax or relu"] = "softmax",
        norm: Annotated[str, "of the queries: batch, layer or none"] = "batch",
    ) -> None:
        super().__init__(d_model, experts)
        half = (d_model + 3) // 4 if d_key is None else d_key // 2
        if heads < 1 or keys < 1 or half < 1 or (d_key or 0) % 2:
            raise PumiceError(f"heads={heads!r}, keys={keys!r} must be above 0 and d_key={d_key!r} even.")
        if gate not in GATES or norm not in NORMS:
            raise PumiceError(f"gate={gate!r} is none of {', '.join(GATES)} or norm={norm!r} of {', '.join(NORMS)}.")
        self.rows = next(m for m in range(math.isqrt(experts), 0, -1) if experts % m == 0)
        self.columns = experts // self.rows
        self.heads, self.keys, self.width, self.gate, self.norm = heads, min(keys, experts), half, gate, norm
        self.query_QD = nn.Parameter(torch.empty(heads * 2 * half, d_model).normal_(std=d_model**-0.5))
        self.row_MQ = nn.Parameter(torch.empty(self.rows, half).normal_(std=half**-0.5))
        self.column_NQ = nn.Parameter(torch.empty(self.columns, half).normal_(std=half**-0.5))
        self.register_buffer("mean_HQ", torch.zeros(heads * 2 * half))
        self.register_buffer("variance_HQ", torch.ones(heads * 2 * half))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        query_T2HQ = self._normalised(F.linear(x_TD, self.query_QD), context).view(-1, 2, self.heads, self.width)
        score_THM = query_T2HQ[:, 0] @ self.row_MQ.t()
        score_THN = query_T2HQ[:, 1] @ self.column_NQ.t()
        score_THK, expert_THK = self._best_pairs(score_THM, score_THN)
        weight_THK = score_THK.softmax(2) if self.gate == "softmax" else score_THK.relu()
        return Routing(
            score_THK.flatten(1),
            weight_THK.flatten(1),
            candidate_TC=expert_THK.flatten(1),
            experts=self.experts,
        )

    def _best_pairs(self, score_THM: Tensor, score_THN: Tensor) -> tuple[Tensor, Tensor]:
        """The K largest sums of one score of each half, and their experts."""
        row_THK, i_THK = select.largest(score_THM, min(self.keys, self.rows))
        column_THK, j_THK = select.largest(score_THN, min(self.keys, self.columns))
        sum_THP = (row_THK[..., :, None] + column_THK[..., None, :]).flatten(2)
        expert_THP = (i_THK[..., :, None] * self.columns + j_THK[..., None, :]).flatten(2)
        score_THK, pair_THK = select.largest(sum_THP, self.keys)
        return score_THK, expert_THP.gather(2, pair_THK)

    def _normalised(self, query_THQ: Tensor, context: RouteContext) -> Tensor:
        if self.norm == "none":
            return query_THQ
        if self.norm == "layer":
            return F.layer_norm(query_THQ.unflatten(1, (-1, self.width)), (self.width,)).flatten(1)
        # One token has no variance over the batch.
        fresh = context.training and query_THQ.shape[0] > 1
        return (
            F.batch_norm(query_THQ, self.mean_HQ, self.variance_HQ, training=fresh) if query_THQ.shape[0] else query_THQ
        )
