"""Sparse products as PyTorch operators, so that torch.compile, torch.export and autograd see them.

Payload sizes are opaque to a graph: `linear_bitmask` of two layers of one shape is the same operator on tensors of the
same rank, however many values each holds. Inference without a graph does not come here: it calls prepared backends.
Legend: R rows of x, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.core import dispatch
from pumice.kernels import cpu_backend, reference
from pumice.kernels.coded_ops import traced_coded
from pumice.weights.layouts.base import Packed

# Of each layout: the tensors beside `values` that say where they stand, and its parameters, in the operators' order.
STRUCTURE = {
    "bitmask": ("bitmask",),
    "nm": ("codes",),
    "block": ("columns", "row_starts"),
    "csr": ("columns", "row_starts"),
    "csr-tiles": ("offsets", "order", "steps"),
}
PARAMS = {"bitmask": (), "nm": ("n", "m"), "block": (), "csr": (), "csr-tiles": ()}


def _packed(
    layout: str, shape: Sequence[int], values: Tensor, structure: Sequence[Tensor], params: Sequence[int]
) -> Packed:
    tensors = {"values": values, **dict(zip(STRUCTURE[layout], structure, strict=True))}
    named = dict(zip(PARAMS[layout], params, strict=True))
    if layout == "block":
        named = {"r": values.shape[1], "c": values.shape[2]}
    return Packed(layout, (int(shape[0]), int(shape[1])), values.dtype, tensors, named)


def _linear(packed: Packed, bias: Tensor | None, x_RI: Tensor) -> Tensor:
    """What an operator does when it runs: the best backend, bound for this call only."""
    if x_RI.dtype is not packed.dtype:
        return reference.linear(x_RI, packed, bias)
    call = dispatch.Call(
        "linear", packed.layout, packed.dtype, str(x_RI.device), x_RI.shape[0], packed.shape, packed.params
    )
    return dispatch.choose(call).prepare(packed, bias)(x_RI)


@torch.library.custom_op("pumice::row_starts", mutates_args=(), schema="(Tensor bitmask, SymInt width) -> Tensor")
def row_starts(bitmask: Tensor, width: int) -> Tensor:
    """Where each row's values begin: uint8 [O, ceil(I / 8)] to int64 [O + 1]."""
    return cpu_backend.row_starts(bitmask.cpu(), width).to(bitmask.device)


@row_starts.register_fake
def _(bitmask: Tensor, width: int) -> Tensor:
    return bitmask.new_empty(bitmask.shape[0] + 1, dtype=torch.int64)


@torch.library.custom_op(
    "pumice::unpack",
    mutates_args=(),
    schema="(Tensor values, Tensor[] structure, str layout, SymInt[] shape, int[] params) -> Tensor",
)
def unpack(
    values: Tensor, structure: Sequence[Tensor], layout: str, shape: Sequence[int], params: Sequence[int]
) -> Tensor:
    """The dense matrix w_OI of a stored one."""
    return reference.unpack(_packed(layout, shape, values, structure, params)).clone()


@unpack.register_fake
def _(values: Tensor, structure: Sequence[Tensor], layout: str, shape: Sequence[int], params: Sequence[int]) -> Tensor:
    return values.new_empty(tuple(shape))


@torch.library.custom_op(
    "pumice::sample",
    mutates_args=(),
    schema="(Tensor w_OI, Tensor values, Tensor[] structure, str layout, int[] params) -> Tensor",
)
def sample(w_OI: Tensor, values: Tensor, structure: Sequence[Tensor], layout: str, params: Sequence[int]) -> Tensor:
    """The entries of a dense matrix at the places that a layout stores, in the shape of its `values`."""
    places = reference.positions(_packed(layout, w_OI.shape, values, structure, params))
    # What only fills up is nowhere, and stays zero.
    return torch.where(places < 0, 0, w_OI.flatten()[places.clamp(min=0)]).view(values.shape)


@sample.register_fake
def _(w_OI: Tensor, values: Tensor, structure: Sequence[Tensor], layout: str, params: Sequence[int]) -> Tensor:
    return w_OI.new_empty(values.shape)


def _no_grad(params: Sequence[int]) -> list[None] | None:
    # PyTorch wants a list for a list, and takes an empty one for a list of tensors.
    return None if params else []


def _unpack_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, structure, ctx.layout, _, ctx.params = inputs
    ctx.save_for_backward(values, *structure)


def _unpack_backward(ctx: Any, grad_OI: Tensor) -> tuple[Any, ...]:
    values, *structure = ctx.saved_tensors
    grad = sample(grad_OI, values, structure, ctx.layout, ctx.params)
    return grad, [None] * len(structure), None, None, _no_grad(ctx.params)


def _sample_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    w_OI, _, structure, ctx.layout, ctx.params = inputs
    ctx.shape = w_OI.shape
    ctx.save_for_backward(*structure)


def _sample_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # The transpose of picking places is putting back into them.
    structure = list(ctx.saved_tensors)
    grad_OI = unpack(grad.contiguous(), structure, ctx.layout, ctx.shape, ctx.params)
    return grad_OI, None, [None] * len(structure), None, _no_grad(ctx.params)


unpack.register_autograd(_unpack_backward, setup_context=_unpack_context)
sample.register_autograd(_sample_backward, setup_context=_sample_context)


def _grads(
    ctx: Any, g_RO: Tensor, x_RI: Tensor, values: Tensor, structure: list[Tensor], layout: str, params: Sequence[int]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a sparse product to x, values and bias, by the reference's mathematics."""
    to_x, to_values = ctx.needs_input_grad[:2]
    shape = (g_RO.shape[1], x_RI.shape[1])
    g_x = g_RO @ unpack(values, structure, layout, shape, params).to(g_RO.dtype) if to_x else None
    g_values = None
    if to_values:
        g_values = sample((g_RO.t() @ x_RI).to(values.dtype), values, structure, layout, params)
    return g_x, g_values, g_RO.sum(0).to(ctx.bias_dtype) if ctx.bias_dtype is not None else None


def _differentiable(op: Any, layout: str, extra: int = 0, sizes: int = 0) -> None:
    """Gradients of an operator `(x, values, *structure, *extra tensors, bias, *params, *sizes)`."""
    kept, params = len(STRUCTURE[layout]), len(PARAMS[layout])

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        bias = inputs[2 + kept + extra]
        ctx.params = list(inputs[3 + kept + extra :][:params])
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*inputs[: 2 + kept])

    def backward(ctx: Any, g_RO: Tensor) -> tuple[Any, ...]:
        x_RI, values, *structure = ctx.saved_tensors
        g_x, g_values, g_bias = _grads(ctx, g_RO, x_RI, values, structure, layout, ctx.params)
        return (g_x, g_values, *[None] * (kept + extra), g_bias, *[None] * (params + sizes))

    op.register_autograd(backward, setup_context=setup)


@torch.library.custom_op(
    "pumice::linear_bitmask",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor bitmask, Tensor row_starts, Tensor? bias) -> Tensor",
)
def linear_bitmask(x: Tensor, values: Tensor, bitmask: Tensor, row_starts: Tensor, bias: Tensor | None) -> Tensor:
    """x [R, I] times a bitmask matrix to [R, O]; `row_starts` as the operator of that name gives them."""
    packed = _packed("bitmask", (bitmask.shape[0], x.shape[1]), values, (bitmask,), ())
    packed.tensors[cpu_backend.STARTS] = row_starts
    return _linear(packed, bias, x)


@linear_bitmask.register_fake
def _(x: Tensor, values: Tensor, bitmask: Tensor, row_starts: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], bitmask.shape[0])


@torch.library.custom_op(
    "pumice::linear_nm",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor codes, Tensor? bias, int n, int m) -> Tensor",
)
def linear_nm(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    """x [R, I] times an N:M matrix to [R, O]."""
    return _linear(_packed("nm", (values.shape[0], x.shape[1]), values, (codes,), (n, m)), bias, x)


@linear_nm.register_fake
def _(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


@torch.library.custom_op(
    "pumice::linear_block",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor columns, Tensor row_starts, Tensor? bias) -> Tensor",
)
def linear_block(x: Tensor, values: Tensor, columns: Tensor, row_starts: Tensor, bias: Tensor | None) -> Tensor:
    """x [R, I] times a matrix of blocks to [R, O]."""
    outputs = (row_starts.shape[0] - 1) * values.shape[1]
    return _linear(_packed("block", (outputs, x.shape[1]), values, (columns, row_starts), ()), bias, x)


@linear_block.register_fake
def _(x: Tensor, values: Tensor, columns: Tensor, row_starts: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], (row_starts.shape[0] - 1) * values.shape[1])


@torch.library.custom_op(
    "pumice::linear_csr",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor columns, Tensor row_starts, Tensor? bias) -> Tensor",
)
def linear_csr(x: Tensor, values: Tensor, columns: Tensor, row_starts: Tensor, bias: Tensor | None) -> Tensor:
    """x [R, I] times a compressed-sparse-row matrix to [R, O]."""
    packed = _packed("csr", (row_starts.shape[0] - 1, x.shape[1]), values, (columns, row_starts), ())
    return _linear(packed, bias, x)


@linear_csr.register_fake
def _(x: Tensor, values: Tensor, columns: Tensor, row_starts: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], row_starts.shape[0] - 1)


@torch.library.custom_op(
    "pumice::linear_csr_tiles",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor offsets, Tensor order, Tensor steps, Tensor? bias, SymInt outputs) -> Tensor",
)
def linear_csr_tiles(
    x: Tensor, values: Tensor, offsets: Tensor, order: Tensor, steps: Tensor, bias: Tensor | None, outputs: int
) -> Tensor:
    """x [R, I] times a compressed-sparse-row matrix of `outputs` rows, in tiles, to [R, O]."""
    return _linear(_packed("csr-tiles", (outputs, x.shape[1]), values, (offsets, order, steps), ()), bias, x)


@linear_csr_tiles.register_fake
def _(
    x: Tensor, values: Tensor, offsets: Tensor, order: Tensor, steps: Tensor, bias: Tensor | None, outputs: int
) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


_differentiable(linear_bitmask, "bitmask", extra=1)
_differentiable(linear_nm, "nm")
_differentiable(linear_block, "block")
_differentiable(linear_csr, "csr")
_differentiable(linear_csr_tiles, "csr-tiles", sizes=1)


def _bitmask(packed: Packed, bias: Tensor | None, x_RI: Tensor) -> Tensor:
    stored = packed.tensors
    starts = row_starts(stored["bitmask"], packed.shape[1])
    return linear_bitmask(x_RI, stored["values"], stored["bitmask"], starts, bias)


def _nm(packed: Packed, bias: Tensor | None, x_RI: Tensor) -> Tensor:
    stored = packed.tensors
    return linear_nm(x_RI, stored["values"], stored["codes"], bias, packed.params["n"], packed.params["m"])


def _csr_tiles(packed: Packed, bias: Tensor | None, x_RI: Tensor) -> Tensor:
    structure = [packed.tensors[name] for name in STRUCTURE["csr-tiles"]]
    return linear_csr_tiles(x_RI, packed.tensors["values"], *structure, bias, packed.shape[0])


def _rows_and_columns(op: Callable[..., Tensor]) -> Callable[[Packed, Tensor | None, Tensor], Tensor]:
    def run(packed: Packed, bias: Tensor | None, x_RI: Tensor) -> Tensor:
        stored = packed.tensors
        return op(x_RI, stored["values"], stored["columns"], stored["row_starts"], bias)

    return run


TRACED = {
    "bitmask": _bitmask,
    "nm": _nm,
    "block": _rows_and_columns(linear_block),
    "csr": _rows_and_columns(linear_csr),
    "csr-tiles": _csr_tiles,
}


def traced_linear(packed: Packed, bias: Tensor | None, x: Tensor) -> Tensor:
    """`y = x W^T + bias` by the operator of the layout: x [R, I] to [R, O], with gradients to x, values and bias."""
    if packed.layout == "dense":
        return F.linear(x, packed.tensors["weight"], bias)
    if packed.layout not in TRACED:
        return traced_coded(packed, bias, x)
    return TRACED[packed.layout](packed, bias, x)


dispatch.register_traced("linear", traced_linear)
