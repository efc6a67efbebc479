"""One bit per position, and the nonzero numbers in reading order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pumice.core.registry import layout
from pumice.weights.layouts.base import Layout, Packed, pack_bits, shape_fault, unpack_bits


def count_bits(bitmask: Tensor) -> int:
    """Set bits of a uint8 tensor, summed pairwise in place of unpacking (eight times the memory)."""
    pairs = bitmask - ((bitmask >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return int(((fours + (fours >> 4)) & 0x0F).sum())


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
        bitmask = packed.tensors["bitmask"]
        if i % 8 and bool((bitmask[:, -1] >> (i % 8)).any()):
            return "its bitmask marks columns beyond the width"
        marked, stored = count_bits(bitmask), packed.tensors["values"].numel()
        return None if marked == stored else f"its bitmask marks {marked} numbers and {stored} are stored"
