"""One bit per position, and the nonzero numbers in reading order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pumice.core.registry import layout
from pumice.weights.layouts.base import Layout, Packed, pack_bits, shape_fault, unpack_bits


@layout("bitmask")
class Bitmask(Layout):
    """A bit for every position and the nonzero numbers row by row: the layout for any mask at moderate density.

    Tensors: `values` [nnz] in row-major order; `bitmask` uint8 [O, ceil(I / 8)], bit b of byte j standing for column
    8j + b (least significant first), padding bits zero. At half density bf16 takes 56.25 % of the dense bytes.
    """

    @staticmethod
    def refuse(w_OI: Tensor, **params: int) -> str | None:
        return None

    @staticmethod
    def stored_bytes(w_OI: Tensor, **params: int) -> int:
        return int(torch.count_nonzero(w_OI)) * w_OI.element_size() + w_OI.shape[0] * math.ceil(w_OI.shape[1] / 8)

    @staticmethod
    def pack(w_OI: Tensor, **params: int) -> Packed:
        mask = w_OI != 0
        tensors = {"values": w_OI[mask], "bitmask": pack_bits(mask)}
        return Packed("bitmask", (w_OI.shape[0], w_OI.shape[1]), w_OI.dtype, tensors)

    @staticmethod
    def unpack(packed: Packed) -> Tensor:
        values = packed.tensors["values"]
        mask = unpack_bits(packed.tensors["bitmask"], packed.shape[1])
        return torch.zeros(packed.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)

    @staticmethod
    def fault(packed: Packed) -> str | None:
        o, i = packed.shape
        wrong = shape_fault(
            packed, {"values": ((None,), (packed.dtype,)), "bitmask": ((o, math.ceil(i / 8)), (torch.uint8,))}
        )
        if wrong:
            return wrong
        bits = unpack_bits(packed.tensors["bitmask"], math.ceil(i / 8) * 8)
        if bits[:, i:].any():
            return "its bitmask marks columns beyond the width"
        marked, stored = int(bits.sum()), packed.tensors["values"].numel()
        return None if marked == stored else f"its bitmask marks {marked} numbers and {stored} are stored"
