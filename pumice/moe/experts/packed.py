"""Experts whose weights are stored sparse, each matrix in a layout of its own.

Legend: T tokens, D model width, E experts, F hidden width, O outputs, I inputs, A assignments, n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pumice.core.activation import activate
from pumice.core.errors import PumiceError
from pumice.moe.experts.base import Experts
from pumice.moe.experts.mlp import MLP
from pumice.moe.experts.swiglu import SwiGLU
from pumice.moe.plan import AnyPlan, MergePlan, Plan
from pumice.weights.layouts.base import Packed, pack, pack_smallest
from pumice.weights.modules import SparseLinear

Form = tuple[str, str, float, float]
"""Activation, gate, alpha, limit, as in `pumice.core.activation.activate`."""


class PackedExperts(Experts):
    """E perceptrons of sparse layers, run one expert after the other: gather, two sparse products, scatter-add.

    Only the experts that have tokens read their weights, so few tokens read few bytes; there is no kernel over all
    experts. Soft merging needs dense experts and is refused.
    """

    def __init__(self, ups: Sequence[SparseLinear], downs: Sequence[SparseLinear], form: Form) -> None:
        down = downs[0].packed.shape
        super().__init__(down[0], down[1], len(downs))
        self.ups, self.downs, self.form = nn.ModuleList(ups), nn.ModuleList(downs), form

    @classmethod
    def pack(
        cls,
        up_EOI: Tensor,
        down_EOI: Tensor,
        form: Form,
        *,
        biases: tuple[Tensor | None, Tensor | None] = (None, None),
        layout: str | None = None,
        **params: int,
    ) -> PackedExperts:
        """Store weights [E, F or 2F, D] and [E, D, F]; without a layout each matrix in the smallest that fits it.

        Raises:
            PumiceError: the layout refuses a matrix; the reason is given.
        """

        def one(w_OI: Tensor) -> Packed:
            return pack_smallest(w_OI) if layout is None else pack(w_OI, layout, grid=None, **params)

        def layers(weight_EOI: Tensor, bias_EO: Tensor | None) -> list[SparseLinear]:
            return [
                SparseLinear(one(w_OI), None if bias_EO is None else bias_EO[expert].detach().clone())
                for expert, w_OI in enumerate(weight_EOI.detach())
            ]

        return cls(layers(up_EOI, biases[0]), layers(down_EOI, biases[1]), form)

    @classmethod
    def of(cls, experts: Experts, *, layout: str | None = None, **params: int) -> PackedExperts:
        """The packed twin of a layer's `swiglu` or `mlp` experts: `moe.experts = PackedExperts.of(moe.experts)`.

        Raises:
            PumiceError: another kind of experts, or the layout refuses.
        """
        if not isinstance(experts, SwiGLU | MLP):
            raise PumiceError(f"experts of kind {type(experts).__name__} cannot be packed: only swiglu and mlp can.")
        gate, name = ("halves", "gate_up_proj") if isinstance(experts, SwiGLU) else ("none", "up_proj")
        weights = experts.weights()
        biases = weights.get(f"{name}_bias"), weights.get("down_proj_bias")
        form = (str(experts.activation), gate, 0.0, 0.0)
        return cls.pack(weights[name], weights["down_proj"], form, biases=biases, layout=layout, **params)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weights."""
        return sum(layer.packed.nbytes for layer in (*self.ups, *self.downs) if isinstance(layer, SparseLinear))

    def forward(self, x_TD: Tensor, plan: AnyPlan) -> Tensor:
        if isinstance(plan, MergePlan):
            raise PumiceError("packed experts cannot be averaged: merge them densely, then pack.")
        return super().forward(x_TD, plan)

    def weights(self) -> dict[str, Tensor]:
        return {}

    def compute(self, x_TD: Tensor, plan: Plan, weights: dict[str, Tensor]) -> Tensor:
        del weights
        y_TD = x_TD.new_zeros(plan.tokens, self.d_model, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        for expert, (start, end) in enumerate(pairwise(plan.offsets_E1.tolist())):
            if start == end:
                continue
            token_n = plan.token_A[start:end]
            z_nD = self.downs[expert](activate(self.ups[expert](x_TD[token_n]), *self.form))
            y_TD = y_TD.index_add(0, token_n, z_nD.to(y_TD.dtype) * plan.weight_A[start:end, None].to(y_TD.dtype))
        return y_TD.to(x_TD.dtype)
