"""The router of SMEAR.

Legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing


@router("smear", key="smear", paper="arXiv:2306.03745", chance=True)
class Smear(Router):
    """softmax(W LayerNorm(x)) with expert dropout: in training each expert is left out of a row with probability p.

    The rest is renormalised; a row that would lose all keeps all. Use it with `by="segment"` and assign merge. The
    norm of W's rows is not constrained here. O(T D E).
    """

    def __init__(
        self, d_model: int, experts: int, *, dropout: Annotated[float, "probability that an expert is left out"] = 0.1
    ) -> None:
        super().__init__(d_model, experts)
        self.dropout = dropout
        self.norm = nn.LayerNorm(d_model)
        self.linear = nn.Linear(d_model, experts, bias=False)

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        logits_TE = self.linear(self.norm(x_TD))
        weight_TE = logits_TE.softmax(1)
        if self.dropout and context.training:
            draw_TE = torch.rand(
                logits_TE.shape, dtype=logits_TE.dtype, device=logits_TE.device, generator=context.generator
            )
            kept_TE = draw_TE >= self.dropout
            kept_TE |= ~kept_TE.any(1, keepdim=True)
            weight_TE = weight_TE * kept_TE
            weight_TE = weight_TE / weight_TE.sum(1, keepdim=True).clamp_min(1e-30)
        return Routing(logits_TE, weight_TE)
