"""Experts whose gate is of low rank, so that the first half of it can rank tokens: Autonomy-of-Experts.

Legend: T tokens, D model width, E experts, F hidden width, R rank, A assignments.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from pumice.core.activation import find_activation
from pumice.core.errors import PumiceError
from pumice.core.registry import experts
from pumice.moe.experts.base import Experts
from pumice.moe.grouped import grouped_linear
from pumice.moe.plan import Plan


@experts("autonomous", key="autonomy-of-experts", paper="arXiv:2501.13074", router="autonomy")
class Autonomous(Experts):
    """y = W_down (silu(B A x) * W_up x): low A [E, R, D], gate B [E, F, R], up [E, F, D], down [E, D, F].

    Router `autonomy` has already made A x for all experts; what it left in the plan's routing is gathered, not made
    again. With any other plan (slots, merged experts) A x is made here. The paper starts from a low-rank gate of an
    ordinary model's size; R about D / 4 keeps the parameters of SwiGLU experts of the same F.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        experts: int,
        *,
        rank: Annotated[int | None, "of the gate; none is a quarter of d_model"] = None,
        activation: Annotated[str, "of the gate: silu, gelu, gelu_tanh, relu, relu2, sigmoid"] = "silu",
    ) -> None:
        super().__init__(d_model, d_ff, experts)
        self.rank = max(1, d_model // 4) if rank is None else rank
        if self.rank < 1:
            raise PumiceError(f"rank={rank!r} of kind='autonomous' must be above 0.")
        self._act = find_activation(activation)
        self.low_proj = self.matrix(self.rank, d_model)
        self.gate_proj = self.matrix(d_ff, self.rank)
        self.up_proj = self.matrix(d_ff, d_model)
        self.down_proj = self.matrix(d_model, d_ff)

    def low(self, x_TD: Tensor) -> Tensor:
        """A_e x of all experts as one matrix product: [T, E, R]."""
        return torch.nn.functional.linear(x_TD, self.low_proj.flatten(0, 1)).unflatten(1, (-1, self.rank))

    def compute(self, x_TD: Tensor, plan: Plan, weights: dict[str, Tensor]) -> Tensor:
        low_TER = None if plan.routing is None else plan.routing.cache.get("low_TER")
        if low_TER is None:
            low_AR = grouped_linear(x_TD, weights["low_proj"], plan, gather=True, scatter=False)
        else:
            low_AR = low_TER[plan.token_A, plan.expert_A].to(x_TD.dtype)
        gate_AF = grouped_linear(low_AR, weights["gate_proj"], plan, gather=False, scatter=False)
        up_AF = grouped_linear(x_TD, weights["up_proj"], plan, gather=True, scatter=False)
        up_AF = plan.tapped(up_AF)
        return grouped_linear(self._act(gate_AF) * up_AF, weights["down_proj"], plan, gather=False, scatter=True)

    def flops(self, tokens: int, assignments: int) -> int:
        """Multiply-adds times two of one pass: A x of all experts for all tokens once, the rest for assignments only."""
        ranking = tokens * self.experts * self.rank * self.d_model
        rest = assignments * self.d_ff * (self.rank + 2 * self.d_model)
        return 2 * (ranking + rest)
