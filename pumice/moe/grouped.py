"""One linear map, or a whole perceptron, for each expert, run by a plan: the only way from `pumice.moe` to the kernels.

Legend: T tokens, E experts, O outputs, I inputs, A assignments; of whole experts D model width, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.core import dispatch
from pumice.core.activation import activate
from pumice.core.errors import PumiceError
from pumice.moe.plan import Plan


def grouped_linear(
    x: Tensor, weight_EOI: Tensor, plan: Plan, *, bias_EO: Tensor | None = None, gather: bool, scatter: bool
) -> Tensor:
    """`x W_e^T + b_e` for every assignment of the plan.

    Args:
        x: [T, I] with `gather`, [A, I] without.
        gather: Take each assignment's row of x by its token.
        scatter: Sum each token's results, times the plan's weights, to [T, O]; without, the result is [A, O].

    Raises:
        PumiceError: another number of experts than the plan has, or mixed dtypes.
    """
    if weight_EOI.shape[0] != plan.experts:
        raise PumiceError(f"the weight has {weight_EOI.shape[0]} experts and the plan {plan.experts}: make them equal.")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight_EOI = x.to(dtype), weight_EOI.to(dtype)
        bias_EO = None if bias_EO is None else bias_EO.to(dtype)
    if x.dtype != weight_EOI.dtype:
        raise PumiceError(f"x is {x.dtype} and the experts are {weight_EOI.dtype}: convert one of them.")
    gather, scatter = gather and not plan.in_order, scatter and not plan.in_order
    more = (
        plan.offsets_E1,
        plan.token_A if gather else None,
        plan.token_A if scatter else None,
        plan.weight_A if scatter else None,
        plan.tokens if scatter else 0,
    )
    graph = torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight_EOI, plan.weight_A))
    )
    if graph:
        return dispatch.traced("grouped_linear", weight_EOI, bias_EO, x, *more)
    return _run(x, weight_EOI, bias_EO, more)


def _run(x: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, more: tuple[Any, ...]) -> Tensor:
    gather_A = more[1]
    call = dispatch.Call(
        "grouped_linear",
        "dense",
        x.dtype,
        str(x.device),
        x.shape[0] if gather_A is None else gather_A.shape[0],
        (weight_EOI.shape[1], weight_EOI.shape[2]),
        {"experts": weight_EOI.shape[0]},
    )
    return dispatch.choose(call).prepare(weight_EOI.detach(), None if bias_EO is None else bias_EO.detach())(x, *more)


def expert_mlp(
    x_TD: Tensor,
    up: Tensor,
    down: Tensor,
    plan: Plan,
    *,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    act: str = "silu",
    gate: str = "halves",
    bounds: tuple[float, float] = (1.702, 7.0),
) -> Tensor:
    """Every expert's perceptron for its tokens, summed with the plan's weights: y_TD.

    This is one op, whose hidden layer is activated where it is made; with gradients it keeps the products with `up`. Where
    the plan taps the hidden layer it is two `grouped_linear`.

    Args:
        up: [E, 2F, D], or [E, F, D] with `gate="none"`; any strides.
        down: [E, D, F].
        biases: Of `up` and `down`, each [E, outputs] or None.
        act: silu, gelu, gelu_tanh, relu, relu2, sigmoid or clamped_swish (`pumice.core.activation`).
        gate: "halves", "pairs" or "none": where the gates lie in `up`.
        bounds: Alpha and limit of clamped_swish.

    Raises:
        PumiceError: another number of experts than the plan has, or mixed dtypes.
    """
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        x_TD, up, down = x_TD.to(dtype), up.to(dtype), down.to(dtype)
        biases = (
            None if biases[0] is None else biases[0].to(dtype),
            None if biases[1] is None else biases[1].to(dtype),
        )
    if not up.shape[0] == down.shape[0] == plan.experts:
        raise PumiceError(f"the weights have {up.shape[0]} experts and the plan {plan.experts}: make them equal.")
    if not x_TD.dtype == up.dtype == down.dtype:
        raise PumiceError(f"x is {x_TD.dtype} and the experts are {up.dtype}: convert one of them.")
    if plan.tap is not None:
        both = plan.tapped(grouped_linear(x_TD, up, plan, bias_EO=biases[0], gather=True, scatter=False))
        return grouped_linear(
            activate(both, act, gate, *bounds), down, plan, bias_EO=biases[1], gather=False, scatter=True
        )
    moved = (None, None) if plan.in_order else (plan.token_A, plan.weight_A)
    form = (act, gate, *bounds)
    tensors = [x_TD, up, down, plan.weight_A, *(bias for bias in biases if bias is not None)]
    train = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if train or torch.compiler.is_compiling():
        more = (plan.offsets_E1, *moved, *biases, train)
        return dispatch.traced("expert_mlp", (up, down, form), None, x_TD, *more)
    more = (plan.offsets_E1, *moved, *(None if bias is None else bias.detach() for bias in biases))
    shape, params = (down.shape[2], down.shape[1]), {"experts": plan.experts}
    call = dispatch.Call("expert_mlp", "dense", x_TD.dtype, str(x_TD.device), plan.token_A.shape[0], shape, params)
    return dispatch.choose(call).prepare((up.detach(), down.detach(), form), None)(x_TD, *more)
