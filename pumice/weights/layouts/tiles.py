"""Scattered nonzeros in tiles of 256 columns: `csr` as its kernels read it, three bytes a bf16 weight and some filling.

It is for memory only, where `pack` puts it in the place of the stored form; files have the stored form.
Shapes: O outputs, I inputs, S steps, C chunks of rows, T tiles of columns, H rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.core.registry import layout
from pumice.weights.layouts.base import Layout, Packed, shape_fault
from pumice.weights.layouts.csr import index_dtype
from pumice.weights.layouts.lanes import ROWS, Places, chunk_height, stand

TILE = 256
"""Columns of a tile, so that an offset in it is a byte."""
EACH = 2
"""Numbers of a row in a step."""


def _counts(kept_OI: Tensor) -> Tensor:
    """int64 [C, T, H]: how many nonzeros each row of a chunk has in each tile."""
    (outputs, inputs), height = kept_OI.shape, chunk_height(kept_OI.shape[0])
    chunks, tiles = -(-outputs // height), -(-inputs // TILE)
    padded = F.pad(kept_OI, (0, tiles * TILE - inputs, 0, chunks * height - outputs))
    return padded.view(chunks, height, tiles, TILE).sum(-1).transpose(1, 2)


def _fillers(offsets: Tensor, steps: Tensor) -> Tensor:
    """bool [S, 16, 2]: which numbers only fill up.

    Offsets of a row ascend, and what fills it up after them has offset 0. A row without any number begins with offset 1 twice.
    """
    rows = offsets.view(-1, ROWS, EACH).short()
    before = F.pad(rows[:-1, :, 1], (0, 0, 1, 0))[: len(rows)]
    first = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    first[F.pad(steps.flatten().long().cumsum(0), (1, 0))[:-1][steps.flatten() > 0]] = True
    empty = first[:, None] & (rows[..., 0] == 1) & (rows[..., 1] == 1)
    return torch.stack([~first[:, None] & (rows[..., 0] <= before) | empty, rows[..., 1] <= rows[..., 0]], -1)


@layout("csr-tiles", storable=False)
class CsrTiles(Layout):
    """Nonzero numbers in tiles of 256 columns, the rows of like length side by side: what `csr` runs as.

    Rows are taken in chunks of H, columns in tiles; in each tile of a chunk the rows stand in the order of how many numbers
    they have there: `order` uint8 [C, T, H] says which row of the chunk comes first, second, …, `steps` uint8 [C, T, H / 16]
    how many steps each sixteen of them take. `values` [S·32] and `offsets` uint8 [S·32] have in each step the next two
    numbers of each of sixteen rows and their columns in the tile, ascending. What fills up a row that has none left is 0 at
    offset 0, and for a row without any number 0 at offset 1 in its first step.
    """

    @staticmethod
    def refuse(w_OI: Tensor, **params: int) -> str | None:
        return None

    @staticmethod
    def stored_bytes(w_OI: Tensor, **params: int) -> int:
        made, _ = stand(_counts(w_OI != 0), EACH)
        steps = int(made.steps.sum(dtype=torch.int64))
        return steps * ROWS * EACH * (w_OI.element_size() + 1) + made.order.numel() + made.steps.numel()

    @staticmethod
    def pack(w_OI: Tensor, **params: int) -> Packed:
        kept, (outputs, inputs) = w_OI != 0, w_OI.shape
        counts = _counts(kept)
        made, lane = stand(counts, EACH)
        count = int(made.steps.sum(dtype=torch.int64)) * ROWS * EACH
        values, offsets = w_OI.new_zeros(count), torch.zeros(count, dtype=torch.uint8, device=w_OI.device)
        # An empty row of which there are steps.
        bare = EACH * lane[(counts == 0) & (made.steps.gather(-1, made.order.argsort(-1) // ROWS) > 0)]
        offsets[bare], offsets[bare + 1] = 1, 1
        row, column = kept.nonzero().unbind(1)
        # Numbers follow each other row by row, and in a row tile by tile.
        by_row = counts.transpose(1, 2).flatten(0, 1)[:outputs].flatten()
        tiles = -(-inputs // TILE)
        cell = row * tiles + column // TILE
        nth = torch.arange(len(row), device=row.device) - (by_row.cumsum(0) - by_row)[cell]
        begin = lane.transpose(1, 2).reshape(-1, tiles)[:outputs].flatten()[cell] if len(row) else row
        place = EACH * (begin + nth // EACH * ROWS) + nth % EACH
        values[place], offsets[place] = w_OI[kept], (column % TILE).to(torch.uint8)
        tensors = {"values": values, "offsets": offsets, "order": made.order, "steps": made.steps}
        return Packed("csr-tiles", (outputs, inputs), w_OI.dtype, tensors)

    @staticmethod
    def _places(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
        """Which numbers are none that only fill up, and the row and column of those: bool [S·32], int64 [nnz] twice."""
        offsets, made = packed.tensors["offsets"], Places(packed.tensors["order"], packed.tensors["steps"])
        real = ~_fillers(offsets, made.steps)
        rows = made.rows()[..., None].expand_as(real)[real]
        columns = (offsets.view(real.shape).long() + made.tiles()[:, None, None] * TILE)[real]
        return real.flatten(), rows, columns

    @classmethod
    def unpack(cls, packed: Packed) -> Tensor:
        real, rows, columns = cls._places(packed)
        values = packed.tensors["values"]
        return torch.zeros(packed.shape, dtype=values.dtype, device=values.device).index_put(
            (rows, columns), values[real]
        )

    @classmethod
    def numbers(cls, packed: Packed) -> Tensor:
        if packed.tensors["values"].is_meta:  # places follow from what is stored
            return packed.tensors["values"]
        return packed.tensors["values"][cls._places(packed)[0]]

    @classmethod
    def for_files(cls, packed: Packed) -> Packed:
        real, rows, columns = cls._places(packed)
        order = (rows * packed.shape[1] + columns).argsort()
        starts = torch.zeros(packed.shape[0] + 1, dtype=torch.int32, device=rows.device)
        starts[1:] = torch.bincount(rows, minlength=packed.shape[0]).cumsum(0)
        tensors = {
            "values": packed.tensors["values"][real][order],
            "columns": columns[order].to(index_dtype(packed.shape[1])),
            "row_starts": starts,
        }
        return Packed("csr", packed.shape, packed.dtype, tensors)

    @staticmethod
    def misshapen(packed: Packed) -> str | None:
        """What of tensors, counts and order does not fit the matrix, or None: what kernels rely on."""
        o, i = packed.shape
        height = chunk_height(o)
        groups = -(-o // height), -(-i // TILE)
        expected: dict[str, Any] = {
            "values": ((None,), (packed.dtype,)),
            "offsets": ((None,), (torch.uint8,)),
            "order": ((*groups, height), (torch.uint8,)),
            "steps": ((*groups, height // ROWS), (torch.uint8,)),
        }
        wrong = shape_fault(packed, expected)
        if wrong is not None:
            return wrong
        steps, order = packed.tensors["steps"], packed.tensors["order"]
        total = int(steps.sum(dtype=torch.int64)) * ROWS * EACH
        if {len(packed.tensors["values"]), len(packed.tensors["offsets"])} != {total}:
            return "its steps do not match what is stored"
        every = torch.arange(height, device=order.device)
        return "its order names a row twice" if bool((order.sort(-1).values != every).any()) else None

    @classmethod
    def fault(cls, packed: Packed) -> str | None:
        wrong = cls.misshapen(packed)
        if wrong is not None:
            return wrong
        steps = packed.tensors["steps"].short()
        if bool((steps[..., 1:] > steps[..., :-1]).any()):
            return "its rows do not stand in the order of their numbers"
        real, rows, columns = cls._places(packed)
        if bool((rows >= packed.shape[0]).any()) or bool((columns >= packed.shape[1]).any()):
            return "it has numbers outside of the matrix"
        offsets = packed.tensors["offsets"]
        if bool(packed.tensors["values"][~real].any()) or bool((offsets[~real] > 1).any()):
            return "its columns do not ascend within a row"
        return None
