"""ReLU routing: what is positive is selected, and an L1 term that adapts itself sets how much that is.

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


@router("remoe", key="remoe", paper="arXiv:2412.14711", trains=True)
class ReMoE(Router):
    """relu(W x): positive entries are selection and combine weight in one, so that routing is continuous.

    Go with `assign="threshold"`. Every training step adds `λ · mean_t Σ_e f_e R_te`, an L1 norm in which an expert
    counts by its load f_e = E / (k T) · Σ_t 1[R_te > 0], and then moves λ by a factor: up by `alpha` while the share of
    zeros is below 1 - k / E, down while it is above. λ is the buffer `coefficient` and so part of every checkpoint.
    It does not change outside training. O(T D E).

    The paper shares one λ among all layers and measures their mean sparsity; here each layer has its own, so that
    each comes to k experts a token on average. A step whose forward pass runs twice (activation checkpointing) moves λ
    twice. λ_0 = 1e-8 and α = 1.2 are from memory, and so is the initial scale.
    """

    coefficient: Tensor

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        active: Annotated[float, "experts of a token on average, k"] = 2.0,
        alpha: Annotated[float, "factor of λ each step"] = 1.2,
        initial: Annotated[float, "λ of the first step"] = 1e-8,
        balance: Annotated[bool, "weight the L1 norm by load"] = True,
    ) -> None:
        super().__init__(d_model, experts)
        if not 0 < active <= experts:
            raise PumiceError(f"active={active} with experts={experts}: a token can have above 0 to {experts}.")
        if alpha <= 1 or initial <= 0:
            raise PumiceError(f"alpha={alpha} must be above 1 and initial={initial} above 0: λ moves by factors.")
        self.active, self.alpha, self.balance = active, alpha, balance
        self.weight_ED = nn.Parameter(nn.init.normal_(torch.empty(experts, d_model), std=d_model**-0.5))
        self.register_buffer("coefficient", torch.tensor(float(initial)))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        logits_TE = F.linear(x_TD, self.weight_ED)
        weight_TE = F.relu(logits_TE)
        losses = {}
        if context.training and x_TD.shape[0]:
            losses["remoe"] = self.coefficient.clone() * self.l1(weight_TE)
            self.adapt(weight_TE)
        return Routing(logits_TE, weight_TE, losses=losses)

    def l1(self, weight_TE: Tensor) -> Tensor:
        """Mean over tokens of the L1 norm of their weights, experts weighted by load."""
        if not self.balance:
            return weight_TE.sum(1).mean()
        load_E = (weight_TE > 0).to(weight_TE.dtype).mean(0) * (self.experts / self.active)
        return (weight_TE @ load_E).mean()

    @torch.no_grad()
    def adapt(self, weight_TE: Tensor) -> None:
        """One step of λ towards the wanted share of zeros."""
        zeros = (weight_TE == 0).to(self.coefficient.dtype).mean()
        self.coefficient.mul_(self.alpha ** torch.sign(1 - self.active / self.experts - zeros))
