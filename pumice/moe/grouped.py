"""One linear map for each expert, run by a plan: the only way from `pumice.moe` to the kernels.

Legend: T tokens, E experts, O outputs, I inputs, A assignments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.core import dispatch
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
