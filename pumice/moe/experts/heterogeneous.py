"""Experts of different size: HMoE.

Legend: T tokens, D model width, E experts, F hidden width, H the sum of all hidden widths.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.activation import find_activation
from pumice.core.errors import PumiceError
from pumice.core.registry import experts
from pumice.moe.experts.base import Experts
from pumice.moe.plan import Plan


def progression(mean: int, experts: int, spread: float) -> list[int]:
    """Whole numbers from about (1 - spread) · mean to (1 + spread) · mean, evenly spaced, with the sum mean · experts."""
    steps = max(experts - 1, 1)
    sizes = [max(1, round(mean * (1 - spread + 2 * spread * one / steps))) for one in range(experts)]
    if experts == 1:
        return [mean]
    for one in range(experts - 1, -1, -1):
        sizes[one] = max(1, sizes[one] + mean * experts - sum(sizes))
        if sum(sizes) == mean * experts:
            break
    return sizes


@experts("heterogeneous", key="hmoe", paper="arXiv:2408.10681", merges=False)
class Heterogeneous(Experts):
    """SwiGLU experts whose hidden sizes are an arithmetic progression around d_ff, smallest first.

    Parameters of all experts lie one after the other: gate and up [H, D], down [H, D] (transposed, so that an expert is
    a block of rows everywhere). Each expert is one pair of products, run in turn. Goes with balance
    `parameter_penalty`. The paper's own progressions are given as shares; `spread` is this project's way to say them.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        experts: int,
        *,
        spread: Annotated[float, "half the range of sizes over their mean, in [0, 1)"] = 0.5,
        activation: Annotated[str, "of the gate: silu, gelu, gelu_tanh, relu, relu2, sigmoid"] = "silu",
    ) -> None:
        super().__init__(d_model, d_ff, experts)
        if not 0 <= spread < 1:
            raise PumiceError(f"spread={spread!r} of kind='heterogeneous' must be in [0, 1).")
        self._act = find_activation(activation)
        self.sizes = progression(d_ff, experts, spread)
        total, bound = sum(self.sizes), d_model**-0.5
        self.gate_proj = nn.Parameter(torch.empty(total, d_model).uniform_(-bound, bound))
        self.up_proj = nn.Parameter(torch.empty(total, d_model).uniform_(-bound, bound))
        inputs_H1 = torch.tensor(self.sizes).repeat_interleave(torch.tensor(self.sizes))[:, None]
        self.down_proj = nn.Parameter(torch.empty(total, d_model).uniform_(-1, 1) / inputs_H1.sqrt())

    @property
    def size_E(self) -> Tensor:
        return torch.tensor(self.sizes, dtype=torch.float32, device=self.up_proj.device) / self.d_ff

    def compute(self, x_TD: Tensor, plan: Plan, weights: dict[str, Tensor]) -> Tensor:
        edges = plan.offsets_E1.tolist()
        x_AD = x_TD[plan.token_A]
        parts, first = [], 0
        for expert, size in enumerate(self.sizes):
            rows, mine = slice(edges[expert], edges[expert + 1]), slice(first, first + size)
            first += size
            both = torch.cat([weights["gate_proj"][mine], weights["up_proj"][mine]])
            gate_AF, up_AF = F.linear(x_AD[rows], both).chunk(2, dim=1)
            parts.append((self._act(gate_AF) * up_AF) @ weights["down_proj"][mine])
        # Hidden states of different widths make no matrix: outputs are what a loss can look at here.
        y_AD = plan.tapped(torch.cat(parts)) * plan.weight_A[:, None].to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add(0, plan.token_A, y_AD)
