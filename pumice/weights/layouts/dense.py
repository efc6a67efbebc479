"""Every number, in order."""

from __future__ import annotations

from torch import Tensor

from pumice.core.registry import layout
from pumice.weights.layouts.base import Layout, Packed, shape_fault


@layout("dense")
class Dense(Layout):
    """Every number stored, zeros too: what stays when nothing sparse is smaller.

    Tensors: `weight` [O, I].
    """

    @staticmethod
    def refuse(w_OI: Tensor, **params: int) -> str | None:
        return None

    @staticmethod
    def stored_bytes(w_OI: Tensor, **params: int) -> int:
        return w_OI.numel() * w_OI.element_size()

    @staticmethod
    def pack(w_OI: Tensor, **params: int) -> Packed:
        return Packed("dense", (w_OI.shape[0], w_OI.shape[1]), w_OI.dtype, {"weight": w_OI.contiguous()})

    @staticmethod
    def unpack(packed: Packed) -> Tensor:
        return packed.tensors["weight"]

    @staticmethod
    def fault(packed: Packed) -> str | None:
        return shape_fault(packed, {"weight": (packed.shape, (packed.dtype,))})
