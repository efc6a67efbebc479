"""Very many tiny experts, whose weights are looked up like embeddings: PEER.

Legend: T tokens, D model width, E experts, F hidden width (1 in the paper), A assignments.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
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
        # As embeddings, whose gradients are far faster to sum up than those of an index.
        up_AFD = F.embedding(plan.expert_A, weights["up_proj"].flatten(1)).unflatten(1, (-1, self.d_model))
        x_AD = F.embedding(plan.token_A, x_TD)
        hidden_AF = self._act(plan.tapped((up_AFD * x_AD[:, None]).sum(2)))
        hidden_AF = hidden_AF * plan.weight_A[:, None].to(hidden_AF.dtype)
        down, order_A = weights["down_proj"], plan.by_token_A
        row_AF = plan.expert_A[order_A, None] * down.shape[1] + torch.arange(down.shape[1], device=x_TD.device)
        return F.embedding_bag(
            row_AF.flatten(),
            down.flatten(0, 1),
            plan.starts_T1[:-1] * down.shape[1],
            mode="sum",
            per_sample_weights=hidden_AF[order_A].flatten(),
        )
