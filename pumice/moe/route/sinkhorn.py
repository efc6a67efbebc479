"""Scores from a balanced transport plan between tokens and experts: Sinkhorn routers.

Legend: T tokens, D model width, E experts.
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
from pumice.moe.routing import RouteContext, Routing


def transport(cost_TE: Tensor, steps: int) -> Tensor:
    """exp(cost + u_t + v_e) with rows of sum 1 and columns of sum near T / E: Sinkhorn's iteration in logarithms."""
    tokens, experts = cost_TE.shape
    v_E = cost_TE.new_zeros(experts)
    u_T1 = -cost_TE.logsumexp(1, keepdim=True)
    for _ in range(steps):
        v_E = math.log(tokens / experts) - (cost_TE + u_T1).logsumexp(0)
        u_T1 = -(cost_TE + v_E).logsumexp(1, keepdim=True)
    return (cost_TE + u_T1 + v_E).exp()


@router("sinkhorn", key="vision-moe-router-study", paper="arXiv:2401.15969", causal=False)
class Sinkhorn(Router):
    """Selection compares an entropic optimal transport plan of W x, whose experts all get T / E; weights are softmax(W x).

    With token choice the loads are nearly, not exactly, equal; with expert choice each expert ranks tokens by the plan.
    A higher `temperature` makes the plan smoother. The plan has no gradient; it depends on all tokens of the batch, in
    evaluation too: not causal, and meant for images. O(T D E + steps · T E).

    Which weights the study combines the outputs with is from memory.
    """

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        temperature: Annotated[float, "that logits are divided by before the transport"] = 1.0,
        steps: Annotated[int, "iterations over rows and columns"] = 20,
        renormalise: Annotated[bool, "divide a token's selected weights by their sum"] = False,
    ) -> None:
        super().__init__(d_model, experts)
        if temperature <= 0 or steps < 0:
            raise PumiceError(f"temperature={temperature!r} must be above 0 and steps={steps!r} not negative.")
        self.temperature, self.steps, self.renormalise = temperature, steps, renormalise
        self.weight_ED = nn.Parameter(torch.empty(experts, d_model))
        nn.init.trunc_normal_(self.weight_ED, std=(0.1 / d_model) ** 0.5)

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        logits_TE = F.linear(x_TD, self.weight_ED)
        plan_TE = None
        if x_TD.shape[0]:
            plan_TE = transport(logits_TE.detach() / self.temperature, self.steps)
        return Routing(logits_TE, logits_TE.softmax(1), plan_TE, renormalise=self.renormalise)
