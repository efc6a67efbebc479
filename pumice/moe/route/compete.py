"""CompeteSMoE: now and then all experts compete for every token, and the router learns who wins.

Legend: T tokens, D model width, E experts, K experts of a token.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing


@router("compete", key="competesmoe", paper="arXiv:2402.02526", chance=True)
class Compete(Router):
    """In a share `rate` of the training steps an expert's score is the norm of its output; else a linear router's logit.

    A competition runs all experts on all tokens (E / k times the work of the layer), routes by softmax(‖E_e(x)‖) with
    gradients into the experts, and teaches the router: `distil · (MSE over experts + MSE over the winners)` between its
    softmax and the competition's, which does not change the experts. Other steps, and all use, are a linear router with
    the weights renormalised over the selected experts. O(T D E), and a competition all experts.

    The paper moves the rate by a schedule λ(t) and draws it for each layer; here `rate` is constant and can be set at
    any time. The extra weight on winners and its form are of the second version (arXiv:2505.13380) as reviews give it;
    there the score is a mean softplus instead of a norm.
    """

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        rate: Annotated[float, "share of the training steps that compete"] = 0.1,
        distil: Annotated[float, "factor of the loss that teaches the router"] = 0.1,
        winners: Annotated[int, "best experts whose scores count once more in it"] = 2,
    ) -> None:
        super().__init__(d_model, experts)
        if not 0 <= rate <= 1:
            raise PumiceError(f"rate={rate} is outside 0..1, the share of steps that compete.")
        self.rate, self.distil, self.winners = rate, distil, min(winners, experts)
        self.weight_ED = nn.Parameter(nn.init.normal_(torch.empty(experts, d_model), std=d_model**-0.5))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        logits_TE = F.linear(x_TD, self.weight_ED)
        if not (context.training and x_TD.shape[0] and self.drawn(context.generator)):
            return Routing(logits_TE, logits_TE.softmax(1), renormalise=True)
        response_TE = responses(x_TD, context.need("experts", "router 'compete'"))
        share_TE = response_TE.softmax(1)
        losses = {"compete": self.distil * self.distillation(logits_TE.softmax(1), share_TE.detach())}
        return Routing(response_TE, share_TE, renormalise=True, losses=losses)

    def drawn(self, generator: torch.Generator | None) -> bool:
        """Whether this step competes."""
        device = "cpu" if generator is None else generator.device
        return bool(torch.rand((), generator=generator, device=device) < self.rate)

    def distillation(self, router_TE: Tensor, share_TE: Tensor) -> Tensor:
        """How far the router is from the competition, the winners counted twice."""
        error_TE = (router_TE - share_TE).square()
        _, winner_TK = select.largest(share_TE, self.winners)
        return error_TE.mean() + error_TE.gather(1, winner_TK).mean()


def responses(x_TD: Tensor, experts: Any) -> Tensor:
    """Norm of every expert's output for every token, in the dtype of x."""
    dtype = next(experts.parameters()).dtype
    return experts.every(x_TD.to(dtype)).to(x_TD.dtype).norm(dim=2)
