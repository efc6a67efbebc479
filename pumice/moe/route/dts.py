"""EvoMoE's dense-to-sparse gate: hot and noisy at first, cold at the end.

Legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.registry import router
from pumice.moe.route.base import Router, gumbel
from pumice.moe.routing import RouteContext, Routing


@router("dts", key="evomoe", paper="arXiv:2112.14397", chance=True)
class DenseToSparse(Router):
    """softmax((W x + Gumbel noise) / τ), τ falling linearly with `context.progress`.

    Go with `assign={"name": "threshold", "above": 0.001, "least": 1}`: hot weights are all above the threshold, so that
    training starts with every expert; cold ones leave each token as many as it needs, about one in the end. Noise only
    in training; where nobody trains, τ is `cold`. Without `context.progress` τ stays `hot` in training. The other half
    of EvoMoE, experts that begin as masked copies of one, is `pumice.moe.grow.spawn`. O(T D E).

    From memory: τ from 2 to 0.3. A threshold of 0.001 is in code that compares with EvoMoE. There evaluation takes the
    top-1; a layer made with `assign="token_choice", top_k=1` loads the same checkpoint.
    """

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        hot: Annotated[float, "τ at the start of training"] = 2.0,
        cold: Annotated[float, "τ at its end and in use"] = 0.3,
    ) -> None:
        super().__init__(d_model, experts)
        if not 0 < cold <= hot:
            raise PumiceError(f"cold={cold} must be above 0 and at most hot={hot}: the temperature falls.")
        self.hot, self.cold = hot, cold
        self.weight_ED = nn.Parameter(nn.init.normal_(torch.empty(experts, d_model), std=d_model**-0.5))

    def temperature(self, context: RouteContext) -> float:
        """τ of this call."""
        if not context.training:
            return self.cold
        return self.hot + (self.cold - self.hot) * min(max(context.progress or 0.0, 0.0), 1.0)

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        logits_TE = F.linear(x_TD, self.weight_ED)
        noisy_TE = logits_TE + gumbel(logits_TE, context.generator) if context.training else logits_TE
        return Routing(logits_TE, (noisy_TE / self.temperature(context)).softmax(1))
