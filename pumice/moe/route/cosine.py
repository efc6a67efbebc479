"""Routing on a hypersphere, so that tokens do not collapse onto the experts' directions.

Legend: T tokens, D model width, E experts, P width of the routing space.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.route.linear import GATES
from pumice.moe.routing import RouteContext, Routing


@router("cosine", key="x-moe", paper="arXiv:2204.09179")
class Cosine(Router):
    """cos(W x, e_i) / τ in a space of E / 2 dimensions, τ learned: X-MoE.

    The score depends only on directions: scaling a token or an expert's vector changes nothing. The paper freezes
    the router in fine-tuning, which is `requires_grad_(False)`. The initial τ is from memory. O(T (D + E) P).
    """

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        width: Annotated[int | None, "of the routing space; default half the number of experts"] = None,
        temperature: Annotated[float, "initial τ"] = 0.3,
        gate: Annotated[str, "softmax or sigmoid"] = "softmax",
    ) -> None:
        super().__init__(d_model, experts)
        if gate not in GATES:
            raise PumiceError(f"gate={gate!r} is none of {', '.join(GATES)}.")
        if temperature <= 0:
            raise PumiceError(f"temperature={temperature} must be above 0.")
        width = max(2, experts // 2) if width is None else width
        self.gate = gate
        self.project_PD = nn.Parameter(nn.init.orthogonal_(torch.empty(width, d_model)))
        self.experts_EP = nn.Parameter(torch.randn(experts, width))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        token_TP = F.normalize(F.linear(x_TD, self.project_PD), dim=1)
        expert_EP = F.normalize(self.experts_EP, dim=1)
        logits_TE = F.linear(token_TP, expert_EP) / self.log_temperature.exp()
        return Routing(logits_TE, GATES[self.gate](logits_TE))
