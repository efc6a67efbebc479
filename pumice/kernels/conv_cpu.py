"""Convolutions with scattered nonzeros on the CPU, channels first: nothing is unpacked, and zeros cost nothing.

Stored weights of any layout are copied once, when a layer is bound, into the order in which the kernel walks along them
(`kernels/cpu/conv.h`): columns of w_OI in parts whose inputs at 64 places fit the first cache, in a part output by output.
bf16 is multiplied in pairs where the CPU can, else in fp32; sums are in fp32. Sparse times dense products along contiguous
pixels are the idea of Elsen et al., "Fast Sparse ConvNets" (2019), which does so for 1 x 1 kernels; here other kernels run as
well, each tap being a shift of the padded input.
Legend: N images, C channels, H rows, W columns, O outputs, I = C x kernel positions.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pumice.core.convolution import Convolution
from pumice.core.dispatch import Backend, Call, Run, limits, register
from pumice.core.errors import PumiceError
from pumice.kernels import cpu_backend
from pumice.kernels.cpu_backend import CODES, PRODUCTS
from pumice.kernels.derived import derived
from pumice.weights.layouts.base import Packed, repack, validate

LAYOUTS = ("csr", "bitmask", "nm", "block")
PART = 128
"""Columns of a part: with 64 places of each in fp32 they fill 32 KiB, the size of many a first cache."""
COLUMN, OUTPUTS, MOST_TAPS = 64, 64, 1024
"""As in `kernels/cpu/conv.h`."""
MOST_REMEMBERED = 256
"""Sizes of x whose numbers a bound layer keeps."""


class Taps(NamedTuple):
    """What the kernel reads."""

    values: Tensor
    offsets: Tensor
    starts: Tensor
    order: Tensor


def taps_of(packed: Packed) -> Taps:
    """A stored matrix in the kernel's order, kept while its tensors live and are unchanged.

    Raises:
        PumiceError: positions that point outside of the matrix.
    """
    return derived([packed.tensors["values"], *packed.tensors.values()], lambda: _taps(packed))


def _taps(packed: Packed) -> Taps:
    validate(packed)
    csr = packed if packed.layout == "csr" else repack(packed, "csr")
    outputs, inputs = packed.shape
    values, columns = csr.tensors["values"].detach(), csr.tensors["columns"].long()
    rows = torch.repeat_interleave(torch.arange(outputs), csr.tensors["row_starts"].long().diff())
    parts = -(-inputs // PART)
    part = columns // PART
    counts_PO = torch.bincount(part * outputs + rows, minlength=parts * outputs).view(parts, outputs)
    # Within each chunk of outputs the shortest first: a loop that is as long as the one before is foreseen.
    chunk_O = torch.arange(outputs) // OUTPUTS
    order_PO = (chunk_O * (PART + 1) + counts_PO).sort(dim=1, stable=True).indices
    place_PO = torch.empty_like(order_PO)
    place_PO.scatter_(1, order_PO, torch.arange(outputs).expand(parts, outputs))
    walk = (part * outputs + place_PO[part, rows]).sort(stable=True).indices
    ends_PO = counts_PO.gather(1, order_PO).flatten().cumsum(0).view(parts, outputs)
    starts = torch.zeros(parts, outputs + 1, dtype=torch.int32)
    if outputs:
        starts[:, 1:] = ends_PO
        starts[1:, 0] = ends_PO[:-1, -1]
    offsets = (columns % PART * COLUMN)[walk].to(torch.uint16)
    return Taps(values[walk], offsets, starts, order_PO.to(torch.int32))


def _bits(value: float) -> int:
    return struct.unpack("i", struct.pack("f", value))[0]


class ConvPlan:
    """A stored weight as the kernel takes it, and what it points into."""

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        native: Any = cpu_backend.native
        if native is None:
            raise PumiceError(f"layout={packed.layout!r} has no C++ kernel here: {cpu_backend.missing()}.")
        taps = taps_of(packed)
        bias_O = None if bias is None else bias.detach().to(torch.float32).contiguous()
        self.shape, self.dtype, self.keep = packed.shape, packed.dtype, (taps, bias_O)
        addresses = [taps.values.data_ptr(), taps.values.numel(), *(tensor.data_ptr() for tensor in taps[1:])]
        address = 0 if bias_O is None else bias_O.data_ptr()
        try:
            self.handle = native.plan_taps(*addresses, address, *packed.shape, PART, CODES[packed.dtype])
        except ValueError as error:
            raise PumiceError(f"layout={packed.layout!r} of shape {packed.shape} is damaged: {error}.") from None


def runs(shape: tuple[int, int], dtype: torch.dtype, handle: Callable[[int], Any]) -> Run:
    """`run(x_NCHW, how, add_NOHW)` of a matrix of that shape; `handle(taps)` is its plan for kernels of so many positions."""
    native: Any = cpu_backend.native
    outputs, inputs = shape
    known: dict[tuple[torch.Size, Convolution], tuple[Any, tuple[int, ...], tuple[int, ...]]] = {}

    def sizes(shape: torch.Size, how: Convolution) -> tuple[Any, tuple[int, ...], tuple[int, ...]]:
        """The plan, the shape of y, and the kernel's numbers."""
        images, channels, *size = shape
        out, taps = how.output(size[0], size[1]), how.kernel_size[0] * how.kernel_size[1]
        if channels * taps != inputs or 0 in out:
            raise PumiceError(f"x is {tuple(shape)}: {how} with {inputs} inputs does not fit it.")
        numbers = (*how.kernel_size, *how.stride, *how.before, *how.dilation, *out, *map(_bits, how.clamp))
        if len(known) >= MOST_REMEMBERED:
            known.clear()
        known[shape, how] = found = handle(taps), (images, outputs, *out), (*shape, *numbers)
        return found

    def run(x_NCHW: Tensor, how: Convolution, add_NOHW: Tensor | None = None) -> Tensor:
        if x_NCHW.dim() != 4 or x_NCHW.dtype is not dtype or not x_NCHW.is_cpu:
            raise PumiceError(
                f"x is {tuple(x_NCHW.shape)} {x_NCHW.dtype} on {x_NCHW.device}: this convolution takes "
                f"[N, C, H, W] {dtype} on cpu."
            )
        plan, shape, numbers = known.get((x_NCHW.shape, how)) or sizes(x_NCHW.shape, how)
        x_NCHW = x_NCHW.contiguous()
        y_NOHW = torch.empty(shape, dtype=dtype)
        add = 0
        if add_NOHW is not None:
            if add_NOHW.shape != y_NOHW.shape or add_NOHW.dtype is not dtype:
                raise PumiceError(f"add is {tuple(add_NOHW.shape)} {add_NOHW.dtype}: y is {tuple(y_NOHW.shape)}.")
            add_NOHW = add_NOHW.contiguous()
            add = add_NOHW.data_ptr()
        native.run_conv(plan, x_NCHW.data_ptr(), y_NOHW.data_ptr(), add, *numbers, torch.get_num_threads())
        return y_NOHW

    return run


def _prepare(packed: Packed, bias: Tensor | None) -> Run:
    plan = ConvPlan(packed, bias)
    return runs(plan.shape, plan.dtype, lambda _: plan.handle)


def refuse(call: Call) -> str | None:
    if call.params.get("groups", 1) != 1:
        return f"a convolution in {call.params['groups']} groups stays dense"
    if not call.params.get("zeros", 1):
        return "padding is with zeros only"
    if call.params.get("kernel_h", 1) * call.params.get("kernel_w", 1) > MOST_TAPS:
        return f"kernels have {MOST_TAPS} positions at most"
    return limits(call, devices=("cpu",), dtypes=PRODUCTS) or cpu_backend.missing()


def _extra(packed: Packed) -> int:
    # Counted, not made: a layer with a norm in it runs from a copy of other numbers.
    outputs, inputs = packed.shape
    values = packed.tensors["values"]
    stored = values.numel() if packed.layout == "csr" else int((values != 0).sum())
    return stored * (values.element_size() + 2) + -(-inputs // PART) * (2 * outputs + 1) * 4


_SUMMARY = "C++: a copy in the order of the taps, channels first, only nonzeros multiplied"
for _layout in LAYOUTS:
    register(Backend("taps", "conv2d", _layout, refuse, _prepare, 30, _SUMMARY, _extra))
