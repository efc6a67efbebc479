"""Four-bit integers with sixteen rows of the matrix side by side: `int4` and `int4-bitmask` as kernels like to read them.

They are for memory only, where `pack` puts them in the place of the stored form; files have the stored form.
Shapes: O outputs, I inputs, G groups in a row, S steps, C chunks of rows, T tiles of columns, H rows of a chunk.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.core import registry
from pumice.weights.grid import Grid
from pumice.weights.layouts.base import Layout, Packed, layout_named, pack_bits, shape_fault, unpack_bits
from pumice.weights.layouts.coded import FLOATS

ROWS = 16
"""Rows side by side."""
TILE = 16
"""Groups of a tile."""
HEIGHTS = (32, 64, 128, 256)
"""Rows that a chunk may have."""


class Places(NamedTuple):
    """Where rows stand: `order` uint8 [C, T, H] and `steps` uint8 [C, T, H / 16], as they are stored."""

    order: Tensor
    steps: Tensor

    def starts(self) -> Tensor:
        """int64 [C·T·H/16 + 1]: the first step of each sixteen rows of each tile."""
        return F.pad(self.steps.flatten().long().cumsum(0), (1, 0))

    def rows(self) -> Tensor:
        """int64 [S, 16]: the row of the matrix in each lane of each step."""
        chunks, _, height = self.order.shape
        first = torch.arange(chunks, device=self.order.device).view(-1, 1, 1) * height
        rows = (self.order.long() + first).view(-1, ROWS)
        return rows.repeat_interleave(self.steps.flatten().long(), 0)

    def tiles(self) -> Tensor:
        """int64 [S]: the tile of each step."""
        chunks, tiles, _ = self.order.shape
        number = torch.arange(tiles, device=self.order.device).repeat(chunks)
        return number.repeat_interleave(self.steps.sum(2, dtype=torch.int64).flatten())


def chunk_height(outputs: int) -> int:
    """H: many rows to a chunk waste little, but every thread wants some chunks."""
    return 128 if outputs >= 1024 else 64 if outputs >= 256 else 32


def lane_height(outputs: int) -> int:
    """H of sixteen rows of integers, where what fills up weighs more: 256 where each thread still has four chunks."""
    return 256 if outputs >= 4 * 256 * torch.get_num_threads() else chunk_height(outputs)


def stand(counts_CTH: Tensor, each: int = 1) -> tuple[Places, Tensor]:
    """Rows in the order of how much they have in a tile, and the lane of the first step of each: int64 [C, T, H] of [S·16].

    A step takes `each` of what a row has.
    """
    order = counts_CTH.argsort(dim=-1, descending=True, stable=True)
    most = counts_CTH.gather(-1, order).unflatten(-1, (-1, ROWS)).amax(-1)
    made = Places(order.to(torch.uint8).contiguous(), ((most + each - 1) // each).to(torch.uint8))
    place = order.argsort(-1)
    first = made.starts()[:-1].view(most.shape).gather(-1, place // ROWS)
    return made, first * ROWS + place % ROWS


def places(kept_OG: Tensor) -> tuple[Places, Tensor]:
    """How the stored groups of a matrix are laid out, and for each of them, in reading order, its lane: int64 of [S·16]."""
    (outputs, groups), height = kept_OG.shape, lane_height(kept_OG.shape[0])
    chunks, tiles = -(-outputs // height), -(-groups // TILE)
    padded = F.pad(kept_OG, (0, tiles * TILE - groups, 0, chunks * height - outputs))
    in_tiles = padded.view(chunks, height, tiles, TILE).transpose(1, 2)
    made, first = stand(in_tiles.sum(-1))
    # A row's groups in a tile take one step after the other.
    lane = first[..., None] + (in_tiles.long().cumsum(-1) - 1) * ROWS
    return made, lane.transpose(1, 2).reshape(chunks * height, tiles * TILE)[:outputs, :groups][kept_OG]


class Lanes(Layout):
    """Four-bit integers with a scale for each group of inputs, sixteen rows side by side.

    Tensors: `codes` uint8 [S, 8·group], a step being a group of each of sixteen rows as [group / 8, 16, 4]: byte b of
    word j has column 4j + b in its lower half and column group/2 + 4j + b in its upper half, as numbers of four bits with a
    sign; `scales` [S, 16]. Where all groups are stored, sixteen rows follow the other, and of each sixteen its groups.
    """

    coded = True
    zero_points = False
    sparse: ClassVar[bool] = False
    examples: ClassVar = ({"group": 16}, {"group": 32})

    @classmethod
    def _plain(cls) -> Any:
        return layout_named("int4-bitmask" if cls.sparse else "int4")

    @classmethod
    def refuse(cls, w_OI: Tensor, *, grid: Grid | None = None, **params: int) -> str | None:
        wrong = cls._plain().refuse(w_OI, grid=grid, **params)
        if wrong or grid is None:
            return wrong
        if grid.zeros is not None:
            return "its grid has zero points"
        return None if grid.group in (16, 32) else f"groups of {grid.group}, where 16 or 32 stand side by side"

    @classmethod
    def candidates(cls, w_OI: Tensor, *, grid: Grid | None = None) -> list[dict[str, int]]:
        return cls._plain().candidates(w_OI, grid=grid)

    @classmethod
    def stored_bytes(cls, w_OI: Tensor, *, grid: Grid | None = None, **params: int) -> int:
        group, (o, i) = params["group"], w_OI.shape
        step = ROWS * (group // 2 + w_OI.element_size())
        if not cls.sparse:
            return -(-o // ROWS) * (i // group) * step
        made, _ = places(cls._plain()._kept(w_OI, group))
        steps = int(made.steps.sum(dtype=torch.int64))
        return steps * (step + ROWS // 2) + made.order.numel() + made.steps.numel()

    @classmethod
    def pack(cls, w_OI: Tensor, *, grid: Grid | None = None, **params: int) -> Packed:
        plain = cls._plain().pack(w_OI, grid=grid, **params)
        (o, i), group = plain.shape, params["group"]
        groups, codes, scales = i // group, plain.tensors["codes"], plain.tensors["scales"]
        if cls.sparse:
            kept = unpack_bits(plain.tensors["bitmask"], groups)
            made, lanes = places(kept)
            count = ROWS * int(made.steps.sum(dtype=torch.int64))
            extra = {"order": made.order, "steps": made.steps, "groups": _nibbles(kept, lanes, count)}
        else:
            lanes, count, extra = _whole(o, groups).to(codes.device), -(-o // ROWS) * ROWS * groups, {}
        in_lanes = codes.new_zeros(count, group // 2)
        in_lanes[lanes] = codes ^ 0x88  # from numbers that begin at 0 to numbers with a sign
        words = in_lanes.view(-1, ROWS, group // 8, 4).transpose(1, 2)
        spread = scales.new_zeros(count)
        spread[lanes] = scales
        tensors = {"codes": words.reshape(-1, 8 * group), "scales": spread.view(-1, ROWS), **extra}
        return Packed(cls.name(), plain.shape, plain.dtype, tensors, {"group": group})

    @classmethod
    def name(cls) -> str:
        return "int4-bitmask-lanes" if cls.sparse else "int4-lanes"

    @classmethod
    def plain(cls, packed: Packed) -> tuple[Packed, Tensor]:
        """The same integers as they are stored in files, and the lane of each group in [S·16]."""
        (o, i), group = packed.shape, packed.params["group"]
        groups, scales = i // group, packed.tensors["scales"]
        words = packed.tensors["codes"].view(-1, group // 8, ROWS, 4)
        in_lanes = words.transpose(1, 2).reshape(-1, group // 2)
        if cls.sparse:
            made = Places(packed.tensors["order"], packed.tensors["steps"])
            halves = packed.tensors["groups"]
            column = torch.cat([halves & 15, halves >> 4], 1) + made.tiles()[:, None] * TILE
            # What only fills up is a group of zeros, and those are not stored.
            stored = in_lanes.any(1).nonzero().squeeze(1)
            place = (made.rows() * groups + column).flatten()[stored]
            lanes = stored[place.argsort()]
            kept = torch.zeros(o * groups, dtype=torch.bool, device=packed.device)
            kept[place] = True
            extra = {"bitmask": pack_bits(kept.view(o, groups))}
        else:
            lanes, extra = _whole(o, groups).to(packed.device), {}
        tensors = {"codes": in_lanes[lanes] ^ 0x88, "scales": scales.flatten()[lanes], **extra}
        name = "int4-bitmask" if cls.sparse else "int4"
        return Packed(name, packed.shape, packed.dtype, tensors, {"group": group}), lanes

    @classmethod
    def for_files(cls, packed: Packed) -> Packed:
        return cls.plain(packed)[0]

    @classmethod
    def unpack(cls, packed: Packed) -> Tensor:
        return cls._plain().unpack(cls.plain(packed)[0])

    @classmethod
    def numbers(cls, packed: Packed) -> Tensor:
        if packed.tensors["codes"].is_meta:  # places follow from what is stored
            return packed.tensors["codes"].new_empty(packed.tensors["scales"].numel(), packed.params["group"])
        return cls._plain().numbers(cls.plain(packed)[0])

    @classmethod
    def grid(cls, packed: Packed) -> Grid:
        return cls._plain().grid(cls.plain(packed)[0])

    @classmethod
    def misshapen(cls, packed: Packed) -> str | None:
        """Which tensor is missing or of another shape than the matrix asks for, or None."""
        (o, i), group = packed.shape, packed.params.get("group", 0)
        if group not in (16, 32) or i % group:
            return f"groups of {group} do not fit the width {i}"
        steps = None if cls.sparse else -(-o // ROWS) * (i // group)
        expected: dict[str, Any] = {
            "codes": ((steps, 8 * group), (torch.uint8,)),
            "scales": ((steps, ROWS), FLOATS),
        }
        if cls.sparse:
            # It was packed for some number of threads.
            height = packed.tensors["order"].shape[-1] if "order" in packed.tensors else chunk_height(o)
            if height not in HEIGHTS:
                return f"chunks of {height} rows are none of {', '.join(map(str, HEIGHTS))}"
            tiles = -(-o // height), -(-(i // group) // TILE)
            expected["order"] = ((*tiles, height), (torch.uint8,))
            expected["steps"] = ((*tiles, height // ROWS), (torch.uint8,))
            expected["groups"] = ((None, ROWS // 2), (torch.uint8,))
        wrong = shape_fault(packed, expected)
        if wrong is None and cls.sparse:
            total = int(packed.tensors["steps"].sum(dtype=torch.int64))
            if {len(packed.tensors[name]) for name in ("codes", "scales", "groups")} != {total}:
                return "its steps do not match what is stored"
        return wrong

    @classmethod
    def fault(cls, packed: Packed) -> str | None:
        wrong = cls.misshapen(packed) or (cls._misplaced(packed) if cls.sparse else None)
        if wrong is None and not bool(torch.isfinite(packed.tensors["scales"]).all()):
            return "a scale is NaN or infinite"
        return wrong

    @classmethod
    def _misplaced(cls, packed: Packed) -> str | None:
        (o, i), tensors = packed.shape, packed.tensors
        made = Places(tensors["order"], tensors["steps"])
        every = torch.arange(made.order.shape[-1], device=packed.device)
        if bool((made.order.sort(-1).values != every).any()):
            return "its order names a row twice"
        group = packed.params["group"]
        halves, stored = tensors["groups"], tensors["codes"].view(-1, group // 8, ROWS, 4).amax((1, 3)) > 0
        column = torch.cat([halves & 15, halves >> 4], 1) + made.tiles()[:, None] * TILE
        rows = made.rows()
        if bool((column >= max(1, i // group)).any()) or bool((rows[stored] >= o).any()):
            return "it has groups outside of the matrix"
        if bool((made.steps[..., 1:] > made.steps[..., :-1]).any()):
            return "its rows do not stand in the order of their groups"
        if bool(tensors["scales"][~stored].any()):
            return "it has a scale where no group is"
        place = (rows * (i // group) + column)[stored]
        return None if place.unique().numel() == place.numel() else "it has a group twice"


def _whole(outputs: int, groups: int) -> Tensor:
    """The lane of each group of a matrix whose groups are all stored, int64 [O·G]."""
    o = torch.arange(outputs)[:, None]
    return ((o // ROWS * groups + torch.arange(groups)) * ROWS + o % ROWS).flatten()


def _nibbles(kept_OG: Tensor, lanes: Tensor, count: int) -> Tensor:
    """uint8 [S, 8]: which group of its tile each lane has, that of lane l + 8 in the upper half of byte l."""
    number = kept_OG.new_zeros(count, dtype=torch.uint8)
    number[lanes] = (
        (torch.arange(kept_OG.shape[1], device=kept_OG.device) % TILE).to(torch.uint8).expand_as(kept_OG)[kept_OG]
    )
    low, high = number.view(-1, 2, ROWS // 2).unbind(1)
    return low | (high << 4)


class SparseLanes(Lanes):
    """Four-bit integers with a scale for each group of inputs, sixteen rows side by side, without groups that are all zero.

    Tensors: `codes` and `scales` as in `int4-lanes`, where a step has the next stored group of each of its sixteen rows (a
    row that has none left is filled up with zeros). Rows are taken in chunks of H, columns in tiles of sixteen groups; in each
    tile of a chunk the rows stand in the order of how many groups they have there: `order` uint8 [C, T, H] says which row of
    the chunk comes first, second, …, `steps` uint8 [C, T, H / 16] how many steps each sixteen of them take, and `groups` uint8
    [S, 8] which group of the tile the rows have in a step: row l in the lower half of byte l, row l + 8 in its upper half.
    """

    sparse = True


registry.layout("int4-lanes", storable=False)(Lanes)
registry.layout("int4-bitmask-lanes", storable=False)(SparseLanes)
