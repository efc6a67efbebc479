"""A column index beside every nonzero number."""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.core.registry import layout
from pumice.weights.layouts.base import Layout, Packed, shape_fault
from pumice.weights.layouts.block import index_fault


def index_dtype(width: int) -> torch.dtype:
    """What a column of a matrix of this width is stored in."""
    return torch.uint16 if width <= 1 << 16 else torch.int32


@layout("csr")
class Csr(Layout):
    """Compressed sparse rows: a column index beside every number, the smallest layout below one nonzero in sixteen.

    Tensors: `values` [nnz] row by row, columns ascending; `columns` uint16 [nnz] (int32 where I > 65536);
    `row_starts` int32 [O + 1].
    """

    @staticmethod
    def refuse(w_OI: Tensor, **params: int) -> str | None:
        nnz = int(torch.count_nonzero(w_OI))
        return f"its {nnz} nonzeros overflow 32-bit row starts" if nnz >= 1 << 31 else None

    @staticmethod
    def stored_bytes(w_OI: Tensor, **params: int) -> int:
        each = w_OI.element_size() + index_dtype(w_OI.shape[1]).itemsize
        return int(torch.count_nonzero(w_OI)) * each + 4 * (w_OI.shape[0] + 1)

    @staticmethod
    def pack(w_OI: Tensor, **params: int) -> Packed:
        mask = w_OI != 0
        starts = torch.zeros(w_OI.shape[0] + 1, dtype=torch.int32, device=w_OI.device)
        starts[1:] = mask.sum(1).cumsum(0)
        columns = mask.nonzero()[:, 1].to(index_dtype(w_OI.shape[1]))
        tensors = {"values": w_OI[mask], "columns": columns, "row_starts": starts}
        return Packed("csr", (w_OI.shape[0], w_OI.shape[1]), w_OI.dtype, tensors)

    @staticmethod
    def unpack(packed: Packed) -> Tensor:
        values, columns, starts = (packed.tensors[name] for name in ("values", "columns", "row_starts"))
        rows = torch.arange(packed.shape[0], device=values.device).repeat_interleave(starts.diff().long())
        w_OI = torch.zeros(packed.shape, dtype=values.dtype, device=values.device)
        return w_OI.index_put((rows, columns.long()), values)

    @staticmethod
    def fault(packed: Packed) -> str | None:
        o, i = packed.shape
        wrong = shape_fault(
            packed,
            {
                "values": ((None,), (packed.dtype,)),
                "columns": ((None,), (index_dtype(i),)),
                "row_starts": ((o + 1,), (torch.int32,)),
            },
        )
        return wrong or index_fault(packed.tensors, packed.tensors["values"].numel(), i)
