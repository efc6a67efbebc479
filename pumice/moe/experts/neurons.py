"""Very many tiny experts, whose weights are looked up like embeddings: PEER.

Legend: T tokens, D model width, E experts, F hidden width (1 in the paper), A assignments.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from pumice.core.activation import find_activation
from pumice.core.registry import experts
from pumice.moe.experts.base import Experts
from pumice.moe.plan import Plan


@experts("neurons", key="peer", paper="arXiv:2407.04153")
class Neurons(Experts):
    """y = Σ_f v_ef act(u_ef · x): rows u and v [E, F, D] are gathered for each assignment, whatever E is.

    Meant for d_ff 1 and an E of 10⁴ and more, where a matrix product for each expert would have one row. Memory and work
    are O(A F D), nothing but the parameters and their gradients is O(E). u starts like a linear layer of D inputs, v
    with standard deviation 1 / √F.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        experts: int,
        *,
        activation: Annotated[str, "silu, gelu, gelu_tanh, relu, relu2, sigmoid"] = "gelu",
    ) -> None:
        super().__init__(d_model, d_ff, experts)
        self._act = find_activation(activation)
        self.up_proj = self.matrix(d_ff, d_model)
        self.down_proj = nn.Parameter(torch.empty(experts, d_ff, d_model).normal_(std=d_ff**-0.5))

    def compute(self, x_TD: Tensor, plan: Plan, weights: dict[str, Tensor]) -> Tensor:
        up_AFD, down_AFD = weights["up_proj"][plan.expert_A], weights["down_proj"][plan.expert_A]
        hidden_AF = plan.tapped(torch.einsum("afd,ad->af", up_AFD, x_TD[plan.token_A]))
        hidden_AF = self._act(hidden_AF) * plan.weight_A[:, None].to(hidden_AF.dtype)
        y_AD = torch.einsum("af,afd->ad", hidden_AF, down_AFD)
        return torch.zeros_like(x_TD).index_add(0, plan.token_A, y_AD)
