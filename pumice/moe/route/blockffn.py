"""ReLU decides which experts fire, a norm how strongly: BlockFFN.

Legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing


@router("blockffn", key="blockffn", paper="arXiv:2507.08771")
class BlockFFN(Router):
    """RMSNorm(ReLU(W x)) over the experts: exactly zero for most, differentiable, of variable size.

    Use it with assign `threshold` (above 0), many small experts without a gate (`kind: {name: mlp, activation:
    silu}`), and the balance losses `chunk_locality` and `chunk_sparsity`. The norm has a gain for each expert, whose
    magnitude counts (weights are not negative). A token for which nothing fires gets nothing. O(T D E).
    """

    def __init__(
        self, d_model: int, experts: int, *, eps: Annotated[float, "added to the mean square under the root"] = 1e-6
    ) -> None:
        super().__init__(d_model, experts)
        self.eps = eps
        self.weight_ED = nn.Parameter(torch.empty(experts, d_model))
        nn.init.normal_(self.weight_ED, std=d_model**-0.5)
        self.gain_E = nn.Parameter(torch.ones(experts))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        logits_TE = F.linear(x_TD, self.weight_ED)
        fired_TE = logits_TE.relu()
        weight_TE = F.rms_norm(fired_TE, (self.experts,), eps=self.eps) * self.gain_E.abs()
        return Routing(logits_TE, weight_TE)
