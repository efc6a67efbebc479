"""Gated experts, as in Mixtral and most language models since.

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


@experts("swiglu", paper="arXiv:2002.05202")
class SwiGLU(Experts):
    """y = W_down (silu(W_gate x) * W_up x): gate and up in one matrix [E, 2F, D], gate first, down [E, D, F].

    The layout is that of Transformers' fused experts. Another `activation` makes another GLU.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        experts: int,
        *,
        activation: Annotated[str, "of the gate: silu, gelu, gelu_tanh, relu, relu2, sigmoid"] = "silu",
        bias: Annotated[bool, "add biases to all three maps"] = False,
    ) -> None:
        super().__init__(d_model, d_ff, experts)
        self.activation = activation
        find_activation(activation)
        self.gate_up_proj = self.matrix(2 * d_ff, d_model)
        self.down_proj = self.matrix(d_model, d_ff)
        if bias:
            self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, 2 * d_ff))
            self.down_proj_bias = nn.Parameter(torch.zeros(experts, d_model))

    def compute(self, x_TD: Tensor, plan: Plan, weights: dict[str, Tensor]) -> Tensor:
        biases = (weights.get("gate_up_proj_bias"), weights.get("down_proj_bias"))
        up, down = weights["gate_up_proj"], weights["down_proj"]
        return expert_mlp(x_TD, up, down, plan, biases=biases, act=self.activation, gate="halves")
