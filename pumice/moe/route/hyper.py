"""HyperRouter: the router's matrix comes out of a frozen random network.

Legend: T tokens, D model width, E experts, H hidden width of the hypernetwork.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing


@router("hyper", key="hyperrouter", paper="arXiv:2312.07035")
class Hyper(Router):
    """softmax(W x + b) with (W, b) = H(v): v is a trained vector of the layer, H a random two-layer network that is not.

    Between a trained router, which can collapse, and a random one (`router="random"`), which cannot learn. The weights
    are renormalised over the selected experts, which is the softmax over the top-k. v, of D numbers, is all there is to
    train. It costs E (D + 1) H numbers of buffers and as many multiplications a call; per token O(T D E).

    H as in the authors' code: linear to 256, ReLU, linear to E (D + 1), drawn as `nn.Linear` draws.
    """

    in_HD: Tensor
    in_bias_H: Tensor
    out_RH: Tensor
    out_bias_R: Tensor

    def __init__(
        self, d_model: int, experts: int, *, hidden: Annotated[int, "width of the hypernetwork"] = 256
    ) -> None:
        super().__init__(d_model, experts)
        self.vector_D = nn.Parameter(torch.randn(d_model))
        first, second = nn.Linear(d_model, hidden), nn.Linear(hidden, experts * (d_model + 1))
        for name, value in (("in_HD", first.weight), ("in_bias_H", first.bias)):
            self.register_buffer(name, value.detach())
        for name, value in (("out_RH", second.weight), ("out_bias_R", second.bias)):
            self.register_buffer(name, value.detach())

    def generated(self) -> tuple[Tensor, Tensor]:
        """W [E, D] and b [E]."""
        hidden_H = F.relu(F.linear(self.vector_D, self.in_HD, self.in_bias_H))
        both = F.linear(hidden_H, self.out_RH, self.out_bias_R).view(self.experts, self.d_model + 1)
        return both[:, :-1], both[:, -1]

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        logits_TE = F.linear(x_TD, *self.generated())
        return Routing(logits_TE, logits_TE.softmax(1), renormalise=True)
