"""Plain two-layer experts, as in Switch Transformer.

Legend: T tokens, D model width, E experts, F hidden width, A assignments.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from pumice.core.activation import find_activation
from pumice.core.registry import experts
from pumice.moe.experts.base import Experts
from pumice.moe.grouped import expert_mlp
from pumice.moe.plan import Plan


@experts("mlp")
class MLP(Experts):
    """y = W_down act(W_up x): up [E, F, D], down [E, D, F]."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        experts: int,
        *,
        activation: Annotated[str, "silu, gelu, gelu_tanh, relu, relu2, sigmoid"] = "relu",
        bias: Annotated[bool, "add biases to both maps"] = False,
    ) -> None:
        super().__init__(d_model, d_ff, experts)
        self.activation = activation
        find_activation(activation)
        self.up_proj = self.matrix(d_ff, d_model)
        self.down_proj = self.matrix(d_model, d_ff)
        if bias:
            self.up_proj_bias = nn.Parameter(torch.zeros(experts, d_ff))
            self.down_proj_bias = nn.Parameter(torch.zeros(experts, d_model))

    def compute(self, x_TD: Tensor, plan: Plan, weights: dict[str, Tensor]) -> Tensor:
        biases = (weights.get("up_proj_bias"), weights.get("down_proj_bias"))
        up, down = weights["up_proj"], weights["down_proj"]
        return expert_mlp(x_TD, up, down, plan, biases=biases, act=self.activation, gate="none")
