"""Experts do not compete for weight: σ-MoE.

Legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing


@router("sigma", key="sigma-moe-pkm-framework", paper="arXiv:2310.10837", chance=True, forbids=True)
class Sigma(Router):
    """sigmoid(W x), not renormalised: an expert's weight does not depend on the others.

    In training each expert is left out of a token's choice with probability `dropout`, without rescaling (a mask for
    each token and expert, as in the authors' code). W's rows start with equal norms and a standard deviation of
    `scale` / √D. Goes with kind `sigma` and balance `batch_entropy`. O(T D E).
    """

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        dropout: Annotated[float, "probability that a token may not use an expert"] = 0.0,
        scale: Annotated[float, "standard deviation of the initial weights times √d_model"] = 1.0,
    ) -> None:
        super().__init__(d_model, experts)
        if not 0 <= dropout < 1:
            raise PumiceError(f"dropout={dropout!r} of router 'sigma' must be in [0, 1).")
        self.dropout = dropout
        self.weight_ED = nn.Parameter(torch.empty(experts, d_model))
        nn.init.normal_(self.weight_ED)
        with torch.no_grad():
            # Rows of norm `scale` have root mean square scale / √D.
            self.weight_ED.copy_(scale * F.normalize(self.weight_ED, dim=1))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        logits_TE = F.linear(x_TD, self.weight_ED)
        allowed_TE = None
        if self.dropout and context.training:
            draw_TE = torch.rand(
                logits_TE.shape, dtype=logits_TE.dtype, device=logits_TE.device, generator=context.generator
            )
            allowed_TE = draw_TE >= self.dropout
        return Routing(logits_TE, logits_TE.sigmoid(), allowed_TE=allowed_TE)
