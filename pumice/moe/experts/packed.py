"""Experts whose weights are stored sparse, each matrix in a layout of its own.

Legend: T tokens, D model width, E experts, F hidden width, O outputs, I inputs, A assignments, n tokens of one expert.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pumice.core.activation import activate
from pumice.core.errors import PumiceError
from pumice.moe.experts.base import Experts
from pumice.moe.experts.mlp import MLP
from pumice.moe.experts.swiglu import SwiGLU
from pumice.moe.plan import AnyPlan, MergePlan, Plan
from pumice.weights.layouts.base import Packed, pack, pack_smallest, shape_text
from pumice.weights.modules import SparseLinear
from pumice.weights.wrapped import Substitute

Form = tuple[str, str, float, float]
"""Activation, gate, alpha, limit, as in `pumice.core.activation.activate`."""


@dataclass(frozen=True)
class Parts:
    """The weights of dense experts, [E, O, I] each, and what they are called there."""

    up_name: str
    up_EOI: Tensor
    down_EOI: Tensor
    biases: tuple[Tensor | None, Tensor | None]
    transposed: bool = False
    """The module itself has them as [E, I, O]."""


class PackedExperts(Experts, Substitute):
    """E perceptrons of sparse layers, run one expert after the other: gather, two sparse products, scatter-add.

    Only the experts that have tokens read their weights, so few tokens read few bytes; there is no kernel over all
    experts. Soft merging needs dense experts and is refused. `save` writes every matrix in its smallest layout and `load`
    gives packed experts back, which are dense at no time.
    """

    kind = "experts"
    stands_for = "layer of swiglu or mlp experts"

    def __init__(self, ups: Sequence[nn.Module], downs: Sequence[nn.Module], form: Form) -> None:
        outputs, inputs = downs[0].out_features, downs[0].in_features
        assert isinstance(outputs, int)
        assert isinstance(inputs, int)
        super().__init__(outputs, inputs, len(downs))
        self.ups, self.downs, self.form = nn.ModuleList(ups), nn.ModuleList(downs), form
        # In a list, so that it is no part of this module.
        self._twin: list[nn.Module] = []

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        return isinstance(module, SwiGLU | MLP)

    @classmethod
    def parts(cls, module: Any) -> Parts:
        """The weights of the dense experts that this class stands for."""
        name = "gate_up_proj" if isinstance(module, SwiGLU) else "up_proj"
        weights = module.weights()
        biases = weights.get(f"{name}_bias"), weights.get("down_proj_bias")
        return Parts(name, weights[name], weights["down_proj"], biases)

    @classmethod
    def around(cls, module: Any, entry: Mapping[str, Any], name: str) -> Self:
        parts = cls.parts(module)
        shape = f"{shape_text(parts.up_EOI.shape)}, {shape_text(parts.down_EOI.shape)}"
        if shape != entry["shape"]:
            raise PumiceError(f"{name} holds experts of {entry['shape']} in the checkpoint and of {shape} here.")

        def layers(weight_EOI: Tensor, bias_EO: Tensor | None) -> list[nn.Module]:
            e, o, i = weight_EOI.shape
            like = {"bias": bias_EO is not None, "dtype": weight_EOI.dtype, "device": "meta"}
            return [nn.Linear(i, o, **like).requires_grad_(False) for _ in range(e)]

        form = (str(entry["act"]), str(entry["gate"]), float(entry["alpha"]), float(entry["limit"]))
        made = cls(layers(parts.up_EOI, parts.biases[0]), layers(parts.down_EOI, parts.biases[1]), form)
        return made.standing_for(module)

    def standing_for(self, module: nn.Module) -> Self:
        """Remember the dense module, without its memory, for `to_dense`."""
        self._twin = [_without_memory(module)]
        return self

    def describe(self) -> dict[str, Any]:
        act, gate, alpha, limit = self.form
        sizes = [(len(some), *_shape(some[0])) for some in (self.ups, self.downs)]
        form = {"act": act, "gate": gate, "alpha": alpha, "limit": limit}
        return {"kind": self.kind, "shape": ", ".join(shape_text(size) for size in sizes), **form}

    def dense_tensors(self) -> dict[str, Tensor]:
        if not self._twin:
            raise PumiceError("packed experts made of single layers stand for no dense module: make them by `of`.")
        parts = self.parts(self._twin[0])
        tensors = {}
        both: list[tuple[str, Any]] = [(parts.up_name, self.ups), ("down_proj", self.downs)]
        for name, layers in both:
            dense_EOI = torch.stack([layer.weight.detach() for layer in layers])
            tensors[name] = dense_EOI.transpose(1, 2).contiguous() if parts.transposed else dense_EOI
            if layers[0].bias is not None:
                tensors[f"{name}_bias"] = torch.stack([layer.bias.detach() for layer in layers])
        return tensors

    def to_dense(self) -> nn.Module:
        tensors = self.dense_tensors()
        dense = _without_memory(self._twin[0])
        for name, tensor in tensors.items():
            setattr(dense, name, nn.Parameter(tensor))
        return dense.train(self.training)

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
    ) -> Self:
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
    def of(cls, experts: Experts, *, layout: str | None = None, **params: int) -> Self:
        """The packed twin of a layer's `swiglu` or `mlp` experts: `moe.experts = PackedExperts.of(moe.experts)`.

        Raises:
            PumiceError: another kind of experts, or the layout refuses.
        """
        if not isinstance(experts, SwiGLU | MLP):
            raise PumiceError(f"experts of kind {type(experts).__name__} cannot be packed: only swiglu and mlp can.")
        form = (str(experts.activation), "halves" if isinstance(experts, SwiGLU) else "none", 0.0, 0.0)
        parts = cls.parts(experts)
        made = cls.pack(parts.up_EOI, parts.down_EOI, form, biases=parts.biases, layout=layout, **params)
        return made.standing_for(experts)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weights."""
        layers: list[Any] = [*self.ups, *self.downs]
        return sum(one.packed.nbytes if isinstance(one, SparseLinear) else one.weight.nbytes for one in layers)

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


def _shape(layer: Any) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _without_memory(module: nn.Module) -> nn.Module:
    """A copy on the meta device; the config, which a model's modules share, stays shared."""
    memo: dict[int, Any] = {
        id(one): nn.Parameter(torch.empty_like(one, device="meta"), one.requires_grad) for one in module.parameters()
    }
    config = getattr(module, "config", None)
    return copy.deepcopy(module, memo if config is None else {**memo, id(config): config})
