"""Transformers' experts on Pumice's ops: `experts_implementation="pumice"` after `import pumice`.

Every expert layer that Transformers dispatches by that name runs on `grouped_linear` and, where its gate is one that the
kernels know, on `expert_mlp`. A gate of a model's own runs as the model has it, between the two products.
Legend: T tokens, K experts of a token, E experts, D model width, F hidden width, A assignments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pumice.core.activation import ACTIVATIONS, activate
from pumice.core.errors import PumiceError
from pumice.moe.experts.packed import PackedExperts, Parts
from pumice.moe.grouped import expert_mlp, grouped_linear
from pumice.moe.plan import Plan

NAME = "pumice"
Form = tuple[str, str, float, float]
"""Activation, gate, alpha, limit, as `expert_mlp` takes them."""


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass of an expert layer of Transformers: hidden_states [T, D], both others [T, K], to [T, D].

    Raises:
        PumiceError: weights that are not plain floating-point tensors.
    """
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = _matrix(module, up_name), _matrix(module, "down_proj")
    if hidden_states.dtype != up.dtype and not torch.is_autocast_enabled(hidden_states.device.type):
        hidden_states = hidden_states.to(up.dtype)
    plan = Plan.top_k(top_k_index, top_k_weights, up.shape[0])
    if module._is_expert_parallel:
        plan = _here(plan, top_k_index, top_k_weights)
    biases = (None, None)
    if module.has_bias:
        biases = (getattr(module, f"{up_name}_bias"), module.down_proj_bias)
    form = None if module.has_post_expert_norm else known_form(module)
    if form is not None:
        act, gate, *bounds = form
        return expert_mlp(
            hidden_states, up, down, plan, biases=biases, act=act, gate=gate, bounds=(bounds[0], bounds[1])
        )
    products = grouped_linear(hidden_states, up, plan, bias_EO=biases[0], gather=True, scatter=False)
    hidden = module._apply_gate(products) if module.has_gate else module.act_fn(products)
    if not module.has_post_expert_norm:
        return grouped_linear(hidden, down, plan, bias_EO=biases[1], gather=False, scatter=True)
    z_AD = module.post_expert_norm(grouped_linear(hidden, down, plan, bias_EO=biases[1], gather=False, scatter=False))
    weighted_AD = z_AD.float() * plan.weight_A[:, None].float()
    y_TD = weighted_AD.new_zeros(plan.tokens, z_AD.shape[1]).index_add(0, plan.token_A, weighted_AD)
    return y_TD.to(hidden_states.dtype)


def _matrix(module: Any, name: str) -> Tensor:
    """A weight as [E, outputs, inputs]."""
    weight = getattr(module, name)
    if not isinstance(weight, Tensor) or weight.dim() != 3 or not weight.is_floating_point():
        raise PumiceError(
            f"experts_implementation={NAME!r}: {type(module).__name__}.{name} is no floating-point tensor [experts, "
            "outputs, inputs], but quantised or packed: use experts_implementation='eager'."
        )
    return weight.transpose(1, 2) if module.is_transposed else weight


def _here(plan: Plan, top_k_index: Tensor, top_k_weights: Tensor) -> Plan:
    """The plan without the assignments to other ranks, which expert parallelism marks by an index past the last."""
    tokens, k = top_k_index.shape
    place_A = (top_k_index.flatten() < plan.experts).nonzero().flatten()
    expert_A, weight_A = top_k_index.flatten()[place_A], top_k_weights.flatten()[place_A]
    return Plan.pairs(place_A // k, expert_A, weight_A, tokens, plan.experts)


def known_form(module: Any) -> Form | None:
    """The activation and gate of an expert layer among those that the kernels have, or None.

    Found out once for each layer by trying it on numbers, since models write the same formula in many ways. While a
    graph is traced it is not tried: run the layer once before to have the fused op in the graph.
    """
    found = module.__dict__.get("_pumice_form", False)
    if found is False and not torch.compiler.is_compiling():
        found = module.__dict__["_pumice_form"] = _try_forms(module)
    return found or None


@torch.no_grad()
def _try_forms(module: Any) -> Form | None:
    sample = torch.linspace(-12, 12, 256).view(4, 64).t().contiguous().view(16, 16)
    try:
        theirs = module._apply_gate(sample) if module.has_gate else module.act_fn(sample)
    except (RuntimeError, TypeError):
        return None
    for form in _forms(module):
        ours = activate(sample, *form)
        if ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
            return form
    return None


def _forms(module: Any) -> list[Form]:
    """What a layer may compute, given the numbers that it carries."""
    if not module.has_gate:
        return [(act, "none", 0.0, 0.0) for act in ACTIVATIONS]
    alpha = getattr(module, "alpha", getattr(module, "swiglu_alpha", None))
    limit = getattr(module, "limit", getattr(module, "swiglu_limit", None))
    bounds = []
    if isinstance(alpha, float | int) and isinstance(limit, float | int):
        bounds.append(("clamped_swish", float(alpha), float(limit)))
    plain = [(act, 0.0, 0.0) for act in ACTIVATIONS]
    return [(act, gate, a, b) for gate in ("halves", "pairs") for act, a, b in (*plain, *bounds)]


class PackedLayer(PackedExperts):
    """An expert layer of Transformers with sparse weights, in the place of the dense one."""

    kind = "transformers-experts"
    stands_for = "expert layer of Transformers"

    @property
    def num_experts(self) -> int:
        """As Transformers calls it."""
        return self.experts

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        return hasattr(module, "_is_expert_parallel")

    @classmethod
    def parts(cls, module: Any) -> Parts:
        up = "gate_up_proj" if module.has_gate else "up_proj"
        biases = (getattr(module, f"{up}_bias"), module.down_proj_bias) if module.has_bias else (None, None)
        return Parts(up, _matrix(module, up), _matrix(module, "down_proj"), biases, bool(module.is_transposed))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return super().forward(hidden_states, Plan.top_k(top_k_index, top_k_weights, self.experts))


def pack_experts(model: nn.Module, *, layout: str | None = None, **params: int) -> int:
    """Put `PackedLayer` in the place of every expert layer of a Transformers model; how many there were.

    Each matrix is stored in the given layout, or in the smallest that fits it.

    Raises:
        PumiceError: a layer whose gate is one of its own, or a matrix that the layout refuses.
    """
    layers: list[tuple[str, Any]] = list(model.named_modules())
    found = [(name, module) for name, module in layers if PackedLayer.takes(module)]
    for name, module in found:
        form = None if module.has_post_expert_norm else known_form(module)
        if form is None:
            raise PumiceError(
                f"{name} has a gate or a norm of its own, which packed experts do not know: keep it dense."
            )
        parts = PackedLayer.parts(module)
        packed = PackedLayer.pack(parts.up_EOI, parts.down_EOI, form, biases=parts.biases, layout=layout, **params)
        model.set_submodule(name, packed.standing_for(module).train(module.training))
    return len(found)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
