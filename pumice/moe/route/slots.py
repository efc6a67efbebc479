"""The router of Soft MoE: a score for each slot of each expert.

Legend: T tokens, D model width, E experts, S slots.
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


@router("slots", key="soft-moe", paper="arXiv:2308.00951", columns="slots")
class Slots(Router):
    """scale · normalise(x) normalise(Φ): Φ has `slots` columns for each expert, the scale is learned from 1.

    O(T D S).
    """

    def __init__(self, d_model: int, experts: int, *, slots: Annotated[int, "slots of each expert"] = 1) -> None:
        super().__init__(d_model, experts)
        if slots < 1:
            raise PumiceError(f"slots={slots} must be above 0.")
        self.slots = slots
        self.phi_SD = nn.Parameter(torch.randn(experts * slots, d_model) / d_model**0.5)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        logits_TS = F.linear(F.normalize(x_TD, dim=1), self.scale * F.normalize(self.phi_SD, dim=1))
        return Routing(logits_TS, logits_TS.softmax(1), slots=self.slots)
