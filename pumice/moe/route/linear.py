"""The plain router: one matrix, softmax or sigmoid.

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

GATES = {"softmax": lambda logits: logits.softmax(1), "sigmoid": torch.sigmoid}


@router("linear", key="switch-transformer", paper="arXiv:2101.03961")
class Linear(Router):
    """softmax(W x): the weight of an expert is its share of the softmax over all experts.

    With top_k 1 and `renormalise` off it is Switch Transformer's router (its init scale 0.1 is the default here), with
    top_k 2 and `renormalise` on Mixtral's; `sigmoid` is the gate of BASE layers and of DeepSeek-V3. Jitter multiplies
    the router's inputs by uniform(1 - jitter, 1 + jitter) in training. O(T D E).
    """

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        gate: Annotated[str, "softmax or sigmoid"] = "softmax",
        renormalise: Annotated[bool, "divide a token's selected weights by their sum"] = False,
        jitter: Annotated[float, "half width of the factor on the router's inputs in training"] = 0.0,
        scale: Annotated[float, "variance of the initial weights times d_model"] = 0.1,
    ) -> None:
        super().__init__(d_model, experts)
        if gate not in GATES:
            raise PumiceError(f"gate={gate!r} is none of {', '.join(GATES)}.")
        self.gate, self.renormalise, self.jitter = gate, renormalise, jitter
        self.weight_ED = nn.Parameter(torch.empty(experts, d_model))
        nn.init.trunc_normal_(self.weight_ED, std=(scale / d_model) ** 0.5)

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        if self.jitter and context.training:
            noise_TD = torch.rand(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device, generator=context.generator)
            x_TD = x_TD * (1 + self.jitter * (2 * noise_TD - 1))
        logits_TE = F.linear(x_TD, self.weight_ED)
        return Routing(logits_TE, GATES[self.gate](logits_TE), renormalise=self.renormalise)
