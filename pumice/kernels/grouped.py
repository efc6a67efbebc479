"""Grouped linear maps, one weight for each expert: the ops "grouped_linear" and "grouped_outer" and their backends.

`grouped_linear` is gather → product → scale → scatter-add in one, so that a kernel needs no copies; what it computes is
`reference.grouped_linear`. A backend of it is prepared as `prepare(weight_EOI, bias_EO)` and runs as
`run(x, offsets_E1, gather_A, scatter_A, scale_A, rows)`; one of `grouped_outer` as `prepare(None, None)` and
`run(g, x, offsets_E1, g_rows_A, x_rows_A)`. A call's rows are the assignments, its shape (O, I), its `experts` a
parameter. Weights may have any strides: the backward pass hands in transposed ones. Second derivatives are not there.
Legend: R rows of x, O outputs, I inputs, E experts, A assignments sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.core import dispatch
from pumice.core.dispatch import Backend, Call, Run, limits, register
from pumice.kernels import reference


def _anything(call: Call) -> str | None:
    return None


def _prepare_loop(weight_EOI: Any, bias_EO: Tensor | None) -> Run:
    def run(
        x: Tensor,
        offsets_E1: Tensor,
        gather_A: Tensor | None = None,
        scatter_A: Tensor | None = None,
        scale_A: Tensor | None = None,
        rows: int = 0,
    ) -> Tensor:
        return reference.grouped_linear(x, weight_EOI, offsets_E1, bias_EO, gather_A, scatter_A, scale_A, rows)

    return run


def _refuse_torch(call: Call) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return "this PyTorch has no grouped_mm"
    reason = limits(call, dtypes=(torch.float32, torch.bfloat16, torch.float16))
    if reason is not None:
        return reason
    if call.rows == 0:
        return "grouped_mm takes no empty matrices"
    step = 16 // call.dtype.itemsize
    if any(width % step for width in call.shape):
        return f"grouped_mm wants widths that are multiples of {step}, not {call.shape[0]} and {call.shape[1]}"
    return None


def _expert_of(offsets_E1: Tensor, assignments: int) -> Tensor:
    """expert_A, in a shape that a graph knows beforehand."""
    place_A = torch.arange(assignments, device=offsets_E1.device)
    return torch.searchsorted(offsets_E1, place_A, right=True) - 1


def _dense(matrix: Tensor) -> Tensor:
    """The matrix, copied where neither its rows nor its columns lie side by side."""
    return matrix if 1 in matrix.stride()[-2:] else matrix.contiguous()


def _prepare_torch(weight_EOI: Any, bias_EO: Tensor | None) -> Run:
    weight_EIO = _dense(weight_EOI).transpose(1, 2)

    def run(
        x: Tensor,
        offsets_E1: Tensor,
        gather_A: Tensor | None = None,
        scatter_A: Tensor | None = None,
        scale_A: Tensor | None = None,
        rows: int = 0,
    ) -> Tensor:
        x_AI = x.contiguous() if gather_A is None else x[gather_A]
        z_AO = F.grouped_mm(x_AI, weight_EIO, offs=offsets_E1[1:].to(torch.int32))
        if bias_EO is not None:
            z_AO = z_AO + bias_EO[_expert_of(offsets_E1, z_AO.shape[0])]
        if scatter_A is None:
            return z_AO if scale_A is None else (z_AO * scale_A[:, None]).to(x.dtype)
        half = x.dtype in (torch.bfloat16, torch.float16)
        wide = torch.float32 if half else x.dtype
        z_AO = z_AO.to(wide) if scale_A is None else z_AO * scale_A[:, None].to(wide)
        y_RO = x.new_zeros(rows, z_AO.shape[1], dtype=wide)
        return y_RO.index_add_(0, scatter_A, z_AO).to(x.dtype)

    return run


def _prepare_loop_outer(_: Any, __: Tensor | None) -> Run:
    return reference.grouped_outer


def _prepare_torch_outer(_: Any, __: Tensor | None) -> Run:
    def run(g: Tensor, x: Tensor, offsets_E1: Tensor, g_rows_A: Tensor | None, x_rows_A: Tensor | None) -> Tensor:
        g_AO = g.contiguous() if g_rows_A is None else g[g_rows_A]
        x_AI = x.contiguous() if x_rows_A is None else x[x_rows_A]
        return F.grouped_mm(g_AO.t(), x_AI, offs=offsets_E1[1:].to(torch.int32))

    return run


register(Backend("loop", "grouped_linear", "dense", _anything, _prepare_loop, 0, "F.linear expert by expert"))
register(Backend("torch", "grouped_linear", "dense", _refuse_torch, _prepare_torch, 10, "PyTorch's grouped_mm"))
register(Backend("loop", "grouped_outer", "dense", _anything, _prepare_loop_outer, 0, "a product an expert"))
register(Backend("torch", "grouped_outer", "dense", _refuse_torch, _prepare_torch_outer, 10, "PyTorch's grouped_mm"))


def choose(op: str, like: Tensor, rows: int, experts: int, shape: tuple[int, int]) -> Backend:
    """The backend for a dense op of `experts` matrices of one shape and `rows` assignments, on `like`'s device."""
    return dispatch.choose(Call(op, "dense", like.dtype, str(like.device), rows, shape, {"experts": experts}))


@torch.library.custom_op(
    "pumice::grouped_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor offsets, Tensor? bias, Tensor? gather, Tensor? scatter, Tensor? scale, "
    "SymInt rows) -> Tensor",
)
def grouped_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    scatter: Tensor | None,
    scale: Tensor | None,
    rows: int,
) -> Tensor:
    """`reference.grouped_linear` by the best backend."""
    assignments = x.shape[0] if gather is None else gather.shape[0]
    backend = choose("grouped_linear", x, assignments, weight.shape[0], (weight.shape[1], weight.shape[2]))
    return backend.prepare(weight, bias)(x, offsets, gather, scatter, scale, rows)


@grouped_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    scatter: Tensor | None,
    scale: Tensor | None,
    rows: int,
) -> Tensor:
    assignments = x.shape[0] if gather is None else gather.shape[0]
    return x.new_empty(assignments if scatter is None else rows, weight.shape[1])


@torch.library.custom_op(
    "pumice::grouped_outer",
    mutates_args=(),
    schema="(Tensor g, Tensor x, Tensor offsets, Tensor? g_rows, Tensor? x_rows) -> Tensor",
)
def grouped_outer(g: Tensor, x: Tensor, offsets: Tensor, g_rows: Tensor | None, x_rows: Tensor | None) -> Tensor:
    """`reference.grouped_outer` by the best backend."""
    assignments = x.shape[0] if x_rows is None else x_rows.shape[0]
    backend = choose("grouped_outer", g, assignments, offsets.shape[0] - 1, (g.shape[1], x.shape[1]))
    return backend.prepare(None, None)(g, x, offsets, g_rows, x_rows)


@grouped_outer.register_fake
def _(g: Tensor, x: Tensor, offsets: Tensor, g_rows: Tensor | None, x_rows: Tensor | None) -> Tensor:
    return g.new_empty(offsets.shape[0] - 1, g.shape[1], x.shape[1])


def bias_gradient(g_AO: Tensor, offsets: Tensor) -> Tensor:
    """The sum of each expert's rows, in float32 where they are of half precision: [E, O]."""
    wide = torch.promote_types(g_AO.dtype, torch.float32)
    sums_EO = g_AO.new_zeros(offsets.shape[0] - 1, g_AO.shape[1], dtype=wide)
    return sums_EO.index_add_(0, _expert_of(offsets, g_AO.shape[0]), g_AO.to(wide)).to(g_AO.dtype)


def bias_products(g_AO: Tensor, bias_EO: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """`g_a · b_e`, the bias's part of the gradient of the scales: [A]."""
    return (g_AO * bias_EO[_expert_of(offsets, g_AO.shape[0])]).sum(1, dtype=dtype)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, offsets, bias, gather, scatter, scale, _ = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(x, weight, offsets, bias, gather, scatter, scale)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients to x, weight, bias and scale.

    The unscaled gradient of the gathered inputs, `g_a W_e`, also gives the scale's: `z_a · g_a = x_a · (g_a W_e)`, so
    that the forward's products need be neither kept nor made again.
    """
    x, weight, offsets, bias, gather, scatter, scale = ctx.saved_tensors
    to_x, to_weight, _, to_bias, _, _, to_scale, _ = ctx.needs_input_grad
    g = g.contiguous()
    g_x = g_weight = g_bias = g_scale = None
    if to_x and not to_scale:
        args = (g, weight.transpose(1, 2), offsets, None, scatter, gather, scale)
        g_x = grouped_linear(*args, ctx.rows if gather is not None else 0)
    elif to_x or to_scale:
        raw_AI = grouped_linear(g, weight.transpose(1, 2), offsets, None, scatter, None, None, 0)
        x_AI = x if gather is None else x[gather]
        if to_scale:
            g_scale = (raw_AI * x_AI).sum(1, dtype=scale.dtype)
            if bias is not None:
                g_AO = g if scatter is None else g[scatter]
                g_scale = g_scale + bias_products(g_AO, bias, offsets, scale.dtype)
        if to_x:
            g_AI = raw_AI * scale[:, None]
            g_x = g_AI if gather is None else g_AI.new_zeros(x.shape).index_add_(0, gather, g_AI)
            g_x = g_x.to(x.dtype)
    if to_weight or to_bias:
        if scale is not None:
            g_AO, rows_A = ((g if scatter is None else g[scatter]) * scale[:, None]).to(g.dtype), None
        else:
            g_AO, rows_A = g, scatter
        g_weight = grouped_outer(g_AO, x, offsets, rows_A, gather) if to_weight else None
        if to_bias:
            g_bias = bias_gradient(g_AO if rows_A is None else g_AO[rows_A], offsets)
    return g_x, g_weight, None, g_bias, None, None, g_scale, None


grouped_linear.register_autograd(_backward, setup_context=_context)


def traced_grouped_linear(weight_EOI: Any, bias_EO: Tensor | None, x: Tensor, *more: Any) -> Tensor:
    """`more` is offsets_E1, gather_A, scatter_A, scale_A, rows, as a backend's `run` takes them."""
    offsets_E1, gather_A, scatter_A, scale_A, rows = more
    return grouped_linear(x, weight_EOI, offsets_E1, bias_EO, gather_A, scatter_A, scale_A, rows)


dispatch.register_traced("grouped_linear", traced_grouped_linear)
