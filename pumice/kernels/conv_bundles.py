"""Convolutions on the CPU of which eight outputs at a time, a bundle, share their columns, channels first.

A number of x is read once for the eight, and their sums stay in registers from the first column to the last; nothing is
copied but x with its padding (`kernels/cpu/conv.h`). A bundle has the columns that any of its outputs has, so groups of 8 or
16 outputs of one input and tap cost nothing beyond their nonzeros, and zeros at random are mostly multiplied; which way is
faster is for `pack` to measure. There a zero of the weight times an x that is not finite is NaN, as in a dense convolution.
In layout "dense" no zero is left out.
Legend: O outputs, I = C x kernel positions, B bundles, S steps of two columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pumice.core import convolution
from pumice.core.convolution import BUNDLE
from pumice.core.dispatch import Backend, Run, register
from pumice.core.errors import PumiceError
from pumice.kernels import cpu_backend
from pumice.kernels.conv_cpu import LAYOUTS, MOST_TAPS, refuse, runs
from pumice.kernels.cpu_backend import CODES
from pumice.kernels.derived import derived
from pumice.weights.layouts.base import Packed, unpack, validate

NO_COLUMN = -1
"""As in `kernels/cpu/conv.h`, where it is a number without a sign."""


class Bundles(NamedTuple):
    """What the kernel reads, but that columns are not parted into channel and tap yet."""

    values_SB2: Tensor
    columns_S2: Tensor
    starts: Tensor


def bundles_of(packed: Packed) -> Bundles:
    """A stored matrix in bundles, kept while its tensors live and are unchanged.

    Raises:
        PumiceError: positions that point outside of the matrix.
    """
    # In another order than `taps_of`, since each first tensor keeps one thing.
    return derived([*reversed(packed.tensors.values())], lambda: _bundles(packed))


def _whole(packed: Packed) -> tuple[Tensor, Tensor]:
    """The weight in whole bundles [B, BUNDLE, I], and whether they have a column [B, I]."""
    whole = convolution.bundles(unpack(packed).detach())
    return whole, (whole != 0).any(1) | (packed.layout == "dense")


def _bundles(packed: Packed) -> Bundles:
    validate(packed)
    whole, there_BI = _whole(packed)
    counts_B = there_BI.sum(1)
    starts = torch.zeros(len(counts_B) + 1, dtype=torch.int64)
    starts[1:] = ((counts_B + 1) // 2).cumsum(0)
    bundle_n, column_n = there_BI.nonzero(as_tuple=True)
    # The n-th column of a bundle stands at the n-th half step behind the bundle's beginning.
    place_n = (there_BI.cumsum(1) - 1)[bundle_n, column_n] + 2 * starts[bundle_n]
    steps = int(starts[-1])
    values = whole.new_zeros(2 * steps, BUNDLE)
    values[place_n] = whole[bundle_n, :, column_n]
    columns = torch.full((2 * steps,), NO_COLUMN, dtype=torch.int32)
    columns[place_n] = column_n.to(torch.int32)
    values_SB2 = values.view(steps, 2, BUNDLE).transpose(1, 2).contiguous()
    return Bundles(values_SB2, columns.view(steps, 2), starts.to(torch.int32))


class BundlePlan:
    """A stored weight as the kernel takes it for kernels of so many taps, and what it points into."""

    def __init__(self, bundles: Bundles, bias_O: Tensor | None, shape: tuple[int, int], taps: int) -> None:
        native: Any = cpu_backend.native
        columns = bundles.columns_S2.long()
        codes = torch.where(columns == NO_COLUMN, NO_COLUMN, columns // taps * MOST_TAPS + columns % taps)
        # In 64 bits a number without a sign is a positive one.
        codes = codes.where(codes < 2**31, codes - 2**32).to(torch.int32)
        self.keep = bundles, codes, bias_O
        values, _, starts = bundles
        addresses = values.data_ptr(), len(values), codes.data_ptr(), starts.data_ptr()
        address = 0 if bias_O is None else bias_O.data_ptr()
        self.handle = native.plan_bundles(*addresses, address, *shape, taps, CODES[values.dtype])


def _prepare(packed: Packed, bias: Tensor | None) -> Run:
    bundles = bundles_of(packed)
    bias_O = None if bias is None else bias.detach().to(torch.float32).contiguous()
    plans: dict[int, BundlePlan] = {}

    def handle(taps: int) -> Any:
        if taps > MOST_TAPS:
            raise PumiceError(f"kernel_size has {taps} positions: this convolution takes {MOST_TAPS} at most.")
        if taps not in plans:
            plans[taps] = BundlePlan(bundles, bias_O, packed.shape, taps)
        return plans[taps].handle

    return runs(packed.shape, packed.dtype, handle)


def _extra(packed: Packed) -> int:
    _, there_BI = _whole(packed)
    steps = int(((there_BI.sum(1) + 1) // 2).sum())
    return steps * 2 * (BUNDLE * packed.dtype.itemsize + 4 + 4) + 4 * (len(there_BI) + 1)


_SUMMARY = "C++: a copy in which eight outputs share their columns, channels first"
for _layout in ("dense", *LAYOUTS):
    register(Backend("bundles", "conv2d", _layout, refuse, _prepare, 25, _SUMMARY, _extra))
