"""What every kind of experts is: E copies of one small network, run by a plan.

Legend: T tokens, D model width, E experts, F hidden width, S slots, G groups, A assignments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.moe.plan import AnyPlan, DensePlan, MergePlan, Plan


class Experts(nn.Module):
    """Base of expert kinds: `Kind(d_model, d_ff, experts, *, option=…)`, `forward(x_TD, plan) -> y_TD`.

    A kind creates its parameters, each with the experts on the first axis, and writes `compute` for a `Plan`. Soft
    mixing and soft merging follow from it: a `DensePlan` runs the experts on slots, a `MergePlan` runs `compute` with
    averaged parameters. A kind whose parameters have no common shape says `merges=False` in the registry.
    """

    def __init__(self, d_model: int, d_ff: int, experts: int) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_ff", d_ff), ("experts", experts)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PumiceError(f"{name}={value!r} must be a whole number above 0.")
        self.d_model, self.d_ff, self.experts = d_model, d_ff, experts

    def compute(self, x_TD: Tensor, plan: Plan, weights: dict[str, Tensor]) -> Tensor:
        """y_TD, the sum of every token's experts times the plan's weights, with these parameters in place of its own."""
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, each [E, …]."""
        return dict(self.named_parameters(recurse=False))

    @property
    def size_E(self) -> Tensor:
        """Parameters of each expert, relative to their mean: ones, except where experts differ in size."""
        return torch.ones(self.experts)

    def forward(self, x_TD: Tensor, plan: AnyPlan) -> Tensor:
        if isinstance(plan, DensePlan):
            slots = Plan.slots(plan.dispatch_GLS.shape[0] * plan.slots, self.experts, plan.combine_GLS)
            return plan.combine(self.compute(plan.dispatch(x_TD), slots, self.weights()))
        if isinstance(plan, MergePlan):
            merged = {
                name: torch.einsum("ge,e...->g...", plan.weight_GE.to(weight.dtype), weight)
                for name, weight in self.weights().items()
            }
            return self.compute(x_TD, plan.by_group(), merged)
        return self.compute(x_TD, plan, self.weights())

    def every(self, x_TD: Tensor) -> Tensor:
        """The outputs of all experts for all tokens, y_TED: E times the work, for routers that look at them."""
        tokens = x_TD.shape[0]
        plan = Plan.slots(tokens, self.experts, x_TD.new_ones((), dtype=torch.float32))
        y_AD = self.compute(x_TD.repeat(self.experts, 1), plan, self.weights())
        return y_AD.view(self.experts, tokens, -1).transpose(0, 1)

    def matrix(self, outputs: int, inputs: int) -> nn.Parameter:
        """A new parameter [E, O, I], uniform in ±1/sqrt(inputs) as in `nn.Linear`."""
        weight = torch.empty(self.experts, outputs, inputs)
        return nn.Parameter(nn.init.uniform_(weight, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs)))

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_ff={self.d_ff}, experts={self.experts}"
