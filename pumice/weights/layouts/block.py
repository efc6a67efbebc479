"""Whole r x c blocks, dense inside."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pumice.core.registry import layout
from pumice.weights.layouts.base import Layout, Packed, shape_fault


def _blocks(w_OI: Tensor, r: int, c: int) -> Tensor:
    """A view of the matrix as [O/r, I/c, r, c]."""
    o, i = w_OI.shape
    return w_OI.reshape(o // r, r, i // c, c).transpose(1, 2)


@layout("block")
class Block(Layout):
    """The r x c blocks that hold a nonzero, dense inside, in rows of blocks: one index for r c numbers.

    Tensors: `values` [blocks, r, c]; `columns` int32 [blocks], the block column of each (first column / c);
    `row_starts` int32 [O / r + 1], where each row of blocks begins. Blocks are ordered by row of blocks, then column.
    """

    examples: ClassVar = ({"r": 4, "c": 8}, {"r": 16, "c": 32})

    @staticmethod
    def refuse(w_OI: Tensor, **params: int) -> str | None:
        r, c = params["r"], params["c"]
        o, i = w_OI.shape
        if r < 1 or c < 1:
            return f"r={r}, c={c} must be at least 1"
        return f"blocks of {r} x {c} do not divide it" if o % r or i % c else None

    @staticmethod
    def candidates(w_OI: Tensor) -> list[dict[str, int]]:
        shapes = []
        for r, c in ((16, 32), (32, 32), (16, 16), (8, 8), (4, 4)):
            o, i = w_OI.shape
            # An empty block is rare in a matrix that was not pruned in blocks: the first rows tell.
            if o % r == 0 and i % c == 0 and w_OI.numel() and not bool(_occupied(w_OI[: r * 2], r, c).all()):
                shapes.append({"r": r, "c": c})
        return shapes

    @staticmethod
    def stored_bytes(w_OI: Tensor, **params: int) -> int:
        r, c = params["r"], params["c"]
        blocks = int(_occupied(w_OI, r, c).sum())
        return blocks * (r * c * w_OI.element_size() + 4) + 4 * (w_OI.shape[0] // r + 1)

    @staticmethod
    def pack(w_OI: Tensor, **params: int) -> Packed:
        r, c = params["r"], params["c"]
        occupied = _occupied(w_OI, r, c)
        starts = torch.zeros(occupied.shape[0] + 1, dtype=torch.int32, device=w_OI.device)
        starts[1:] = occupied.sum(1).cumsum(0)
        tensors = {
            # Adding zero turns negative zeros into positive ones.
            "values": _blocks(w_OI, r, c)[occupied] + 0,
            "columns": occupied.nonzero()[:, 1].to(torch.int32),
            "row_starts": starts,
        }
        return Packed("block", (w_OI.shape[0], w_OI.shape[1]), w_OI.dtype, tensors, {"r": r, "c": c})

    @staticmethod
    def unpack(packed: Packed) -> Tensor:
        (o, i), r, c = packed.shape, packed.params["r"], packed.params["c"]
        values, columns, starts = (packed.tensors[name] for name in ("values", "columns", "row_starts"))
        rows = torch.arange(o // r, device=values.device).repeat_interleave(starts.diff().long())
        w_OI = torch.zeros((o // r, i // c, r, c), dtype=values.dtype, device=values.device)
        w_OI = w_OI.index_put((rows, columns.long()), values)
        return w_OI.transpose(1, 2).reshape(o, i)

    @staticmethod
    def fault(packed: Packed) -> str | None:
        (o, i), r, c = packed.shape, packed.params.get("r", 0), packed.params.get("c", 0)
        if r < 1 or c < 1 or o % r or i % c:
            return f"blocks of {r} x {c} do not divide it"
        wrong = shape_fault(
            packed,
            {
                "values": ((None, r, c), (packed.dtype,)),
                "columns": ((None,), (torch.int32,)),
                "row_starts": ((o // r + 1,), (torch.int32,)),
            },
        )
        return wrong or index_fault(packed.tensors, packed.tensors["values"].shape[0], i // c)


def index_fault(tensors: dict[str, Tensor], stored: int, width: int) -> str | None:
    """What is wrong with `row_starts` and `columns` of a compressed-row layout, or None."""
    starts, columns = tensors["row_starts"].long(), tensors["columns"].long()
    if int(starts[0]) != 0 or int(starts[-1]) != stored or columns.numel() != stored or bool((starts.diff() < 0).any()):
        return "its row starts do not count up to the numbers that are stored"
    if columns.numel() and (int(columns.amin()) < 0 or int(columns.amax()) >= width):
        return f"a column index lies outside 0..{width - 1}"
    inside = torch.ones_like(columns, dtype=torch.bool)
    inside[starts[:-1][starts[:-1] < stored]] = False
    return "column indices are not ascending within a row" if bool((columns.diff() <= 0)[inside[1:]].any()) else None


def _occupied(w_OI: Tensor, r: int, c: int) -> Tensor:
    """bool [O/r, I/c]: blocks that hold a nonzero."""
    return (_blocks(w_OI, r, c) != 0).flatten(2).any(-1)
