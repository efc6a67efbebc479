"""A router that is drawn at random and never trained.

Legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing


@router("random", key="smoe-dropout", paper="arXiv:2303.01610", gradient="none")
class Random(Router):
    """softmax(W x) with W a buffer drawn once: SMoE-Dropout's router, which cannot collapse.

    Go with `assign="growing"`, so that k rises to all experts during training and any k serves afterwards. The weights
    are renormalised over the selected experts. W has the variance 1 / D; the paper's initial scale is not known to us.
    Balance losses do not reach it. O(T D E).
    """

    weight_ED: Tensor

    def __init__(self, d_model: int, experts: int) -> None:
        super().__init__(d_model, experts)
        self.register_buffer("weight_ED", torch.randn(experts, d_model) * d_model**-0.5)

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        logits_TE = F.linear(x_TD, self.weight_ED)
        return Routing(logits_TE, logits_TE.softmax(1), renormalise=True)
