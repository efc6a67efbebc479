"""The nearest code names the expert: the discrete router of VQMoE.

Legend: T tokens, D model width, E experts, C codes.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from pumice.core import select
from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing


@router("quantised", key="vqmoe", paper="arXiv:2411.19402", gradient="loss")
class Quantised(Router):
    """A token goes to the expert of its nearest code (Euclidean), with weight 1; codes learn by vector quantisation.

    Code c belongs to expert c mod E; an expert's logit is minus the squared distance to its nearest code. The loss,
    part of the routing, is `|sg(x) - q|² + commit |x - sg(q)|²` as a mean over elements. The code of each token, with
    the straight-through gradient, is in the cache as `quantised_TD`: layer `vqmoe` gives it to the experts.
    Experts asked for beyond the first are those of the next nearest codes. O(T D C).
    """

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        codes: Annotated[int, "codes of each expert"] = 1,
        commit: Annotated[float, "weight of the commitment loss"] = 0.25,
        weight: Annotated[float, "weight of the whole loss"] = 1.0,
    ) -> None:
        super().__init__(d_model, experts)
        self.codes, self.commit, self.weight = codes, commit, weight
        count = codes * experts
        self.code_CD = nn.Parameter(torch.empty(count, d_model).uniform_(-1 / count, 1 / count))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        code_CD = self.code_CD
        square_TC = x_TD.detach().square().sum(1, keepdim=True) + code_CD.detach().square().sum(1)
        near_TC = 2 * x_TD.detach() @ code_CD.detach().t() - square_TC
        code_T = select.largest(near_TC, 1)[1].squeeze(1)
        q_TD = code_CD[code_T]
        size = max(x_TD.numel(), 1)
        codebook = (q_TD - x_TD.detach()).square().sum() / size
        commitment = (q_TD.detach() - x_TD).square().sum() / size
        logits_TE = near_TC.unflatten(1, (self.codes, self.experts)).amax(1).clamp_max(0)
        return Routing(
            logits_TE,
            torch.ones_like(logits_TE),
            # The order of the logits, but positive, as an assignment with a threshold expects.
            select_TE=1 / (1 - logits_TE),
            losses={"quantised": self.weight * (codebook + self.commit * commitment)},
            cache={"quantised_TD": x_TD + (q_TD - x_TD).detach()},
        )
