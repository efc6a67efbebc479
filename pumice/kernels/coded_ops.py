"""Products with stored integers as PyTorch operators, so that torch.compile, torch.export and autograd see them.

One operator for every layout of integers: its `form` says which (`int4-bitmask|bitmask,codes|group`: the layout, the
names of the tensors beside the scales, the names of the parameters). Gradients go to x, the scales and the bias; the
integers have none. Second derivatives are not there.
Legend: R rows of x, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pumice.core import dispatch
from pumice.kernels import reference
from pumice.weights.layouts.base import Packed, layout_named, unpack_bits
from pumice.weights.layouts.lanes import Lanes


def form_of(packed: Packed) -> str:
    """Layout and names, in the order in which the operator takes tensors and parameters."""
    names = sorted(name for name in packed.tensors if name != "scales")
    return f"{packed.layout}|{','.join(names)}|{','.join(sorted(packed.params))}"


def _packed(
    scales: Tensor, structure: Sequence[Tensor], form: str, shape: Sequence[int], params: Sequence[int]
) -> Packed:
    layout, names, keys = form.split("|")
    tensors = {"scales": scales, **dict(zip(names.split(","), structure, strict=True))}
    named = dict(zip(keys.split(",") if keys else (), params, strict=True))
    return Packed(layout, (int(shape[0]), int(shape[1])), scales.dtype, tensors, named)


ARGUMENTS = "Tensor scales, Tensor[] structure, str form, SymInt[] shape, int[] params"


@torch.library.custom_op("pumice::unpack_coded", mutates_args=(), schema=f"({ARGUMENTS}) -> Tensor")
def unpack_coded(
    scales: Tensor, structure: Sequence[Tensor], form: str, shape: Sequence[int], params: Sequence[int]
) -> Tensor:
    """The matrix w_OI that stored integers and scales stand for."""
    return reference.unpack(_packed(scales, structure, form, shape, params)).clone()


@unpack_coded.register_fake
def _(scales: Tensor, structure: Sequence[Tensor], form: str, shape: Sequence[int], *rest: Any) -> Tensor:
    return scales.new_empty(tuple(shape))


@torch.library.custom_op("pumice::scale_sums", mutates_args=(), schema=f"(Tensor w_OI, {ARGUMENTS}) -> Tensor")
def scale_sums(
    w_OI: Tensor, scales: Tensor, structure: Sequence[Tensor], form: str, shape: Sequence[int], params: Sequence[int]
) -> Tensor:
    """For each scale the sum of its integers times the entries of a dense matrix: the gradient of the scales."""
    ones = _packed(torch.ones_like(scales, dtype=torch.float32), structure, form, shape, params)
    products = reference.unpack(ones) * w_OI
    group = ones.params.get("group", 0)
    if not group:
        return products.sum(1).to(scales.dtype)
    sums = products.unflatten(1, (-1, group)).sum(2).flatten()
    cls = layout_named(ones.layout)
    lanes = None
    if issubclass(cls, Lanes):
        ones, lanes = cls.plain(ones)
    if "bitmask" in ones.tensors:
        sums = sums[unpack_bits(ones.tensors["bitmask"], ones.shape[1] // group).flatten()]
    if lanes is None:
        return sums.to(scales.dtype)
    out = torch.zeros_like(scales)
    out.view(-1)[lanes] = sums.to(scales.dtype)
    return out


@scale_sums.register_fake
def _(w_OI: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(scales)


@torch.library.custom_op(
    "pumice::linear_coded", mutates_args=(), schema=f"(Tensor x, {ARGUMENTS}, Tensor? bias) -> Tensor"
)
def linear_coded(
    x: Tensor,
    scales: Tensor,
    structure: Sequence[Tensor],
    form: str,
    shape: Sequence[int],
    params: Sequence[int],
    bias: Tensor | None,
) -> Tensor:
    """x [R, I] times a matrix of integers with scales to [R, O]."""
    packed = _packed(scales, structure, form, shape, params)
    if x.dtype is not packed.dtype:
        return reference.linear(x, packed, bias)
    call = dispatch.Call("linear", packed.layout, packed.dtype, str(x.device), x.shape[0], packed.shape, packed.params)
    return dispatch.choose(call).prepare(packed, bias)(x)


@linear_coded.register_fake
def _(x: Tensor, scales: Tensor, structure: Sequence[Tensor], form: str, shape: Sequence[int], *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], shape[0])


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scales, structure, ctx.form, ctx.shape, ctx.params, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, scales, *structure)


def _backward(ctx: Any, g_RO: Tensor) -> tuple[Any, ...]:
    x_RI, scales, *structure = ctx.saved_tensors
    stored = (scales, structure, ctx.form, ctx.shape, ctx.params)
    to_x, to_scales = ctx.needs_input_grad[:2]
    g_x = g_RO @ unpack_coded(*stored).to(g_RO.dtype) if to_x else None
    g_scales = scale_sums(g_RO.t() @ x_RI, *stored) if to_scales else None
    g_bias = g_RO.sum(0).to(ctx.bias_dtype) if ctx.bias_dtype is not None else None
    # PyTorch wants a list for a list, and takes an empty one for a list of tensors.
    return g_x, g_scales, [None] * len(structure), None, None, None if ctx.params else [], g_bias


linear_coded.register_autograd(_backward, setup_context=_context)


def traced_coded(packed: Packed, bias: Tensor | None, x: Tensor) -> Tensor:
    """`y = x W^T + bias` for a layout of integers: x [R, I] to [R, O], with gradients to x, scales and bias."""
    structure = [packed.tensors[name] for name in sorted(packed.tensors) if name != "scales"]
    params = [packed.params[name] for name in sorted(packed.params)]
    scales = packed.tensors["scales"]
    return linear_coded(x, scales.to(packed.dtype), structure, form_of(packed), list(packed.shape), params, bias)
