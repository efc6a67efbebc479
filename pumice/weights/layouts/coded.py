"""Integers with scales: a value coding over a position layout, one class for each pair.

Eight-bit integers have a scale per row and stand in any position layout (`int8`, `int8-bitmask`, `int8-nm`,
`int8-block`). Three and four bits have a scale per group of neighbouring inputs, and whole groups may be missing
(`int4`, `int4-bitmask`, …). The matrix stored is s·k, multiplied in float32 and rounded once to the dtype.
Shapes: O outputs, I inputs, G groups in a row, n stored groups.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from pumice.core import registry
from pumice.weights.grid import Grid
from pumice.weights.layouts.base import Layout, Packed, layout_named, pack_bits, shape_fault, unpack_bits
from pumice.weights.layouts.bitmask import count_bits

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _misfit(w_OI: Tensor, grid: Grid | None, bits: int, per_row: bool) -> str | None:
    if grid is None:
        return "it needs the grid of the values (quantise the layer with values=…)"
    if grid.bits != bits or (grid.group == 0) != per_row:
        kind = f"{grid.bits}-bit values in groups of {grid.group or 'a whole row'}"
        return f"its grid has {kind}"
    return None if grid.fits(w_OI) else "it does not lie on its grid"


def _scale_fault(packed: Packed) -> str | None:
    scales = packed.tensors["scales"]
    return None if bool(torch.isfinite(scales).all()) else "a scale is NaN or infinite"


class RowCoded(Layout):
    """int8 with one scale a row, the integers standing in another layout.

    Tensors: those of that layout with int8 numbers (`values` [O, I] where it is the dense one), and `scales` [O].
    """

    coded = True
    within: ClassVar[str] = "dense"

    @classmethod
    def _levels(cls, w_OI: Tensor, grid: Grid | None) -> Tensor:
        return w_OI if grid is None else grid.levels(w_OI)

    @classmethod
    def refuse(cls, w_OI: Tensor, *, grid: Grid | None = None, **params: int) -> str | None:
        wrong = _misfit(w_OI, grid, 8, True)
        return wrong or layout_named(cls.within).refuse(cls._levels(w_OI, grid), **params)

    @classmethod
    def candidates(cls, w_OI: Tensor, *, grid: Grid | None = None) -> list[dict[str, int]]:
        return [] if grid is None or grid.bits != 8 else layout_named(cls.within).candidates(w_OI)

    @classmethod
    def stored_bytes(cls, w_OI: Tensor, *, grid: Grid | None = None, **params: int) -> int:
        inner = layout_named(cls.within).stored_bytes(cls._levels(w_OI, grid), **params)
        return inner + w_OI.shape[0] * w_OI.element_size()

    @classmethod
    def pack(cls, w_OI: Tensor, *, grid: Grid | None = None, **params: int) -> Packed:
        assert grid is not None
        inner = layout_named(cls.within).pack(grid.levels(w_OI), **params)
        scales = grid.scales.flatten().to(w_OI.device, w_OI.dtype)
        # A module has a `weight` of its own: the dense one.
        tensors = {"values" if name == "weight" else name: tensor for name, tensor in inner.tensors.items()}
        return Packed(f"int8{_tail(cls.within)}", inner.shape, w_OI.dtype, {**tensors, "scales": scales}, params)

    @classmethod
    def _inner(cls, packed: Packed) -> Packed:
        tensors = {name: tensor for name, tensor in packed.tensors.items() if name != "scales"}
        if cls.within == "dense" and "values" in tensors:
            tensors["weight"] = tensors.pop("values")
        return Packed(cls.within, packed.shape, torch.int8, tensors, packed.params)

    @classmethod
    def unpack(cls, packed: Packed) -> Tensor:
        levels = layout_named(cls.within).unpack(cls._inner(packed))
        return (levels.float() * packed.tensors["scales"].float()[:, None] + 0.0).to(packed.dtype)

    @classmethod
    def fault(cls, packed: Packed) -> str | None:
        own = {"scales": packed.tensors["scales"]} if "scales" in packed.tensors else {}
        alone = Packed(packed.layout, packed.shape, packed.dtype, own)
        wrong = shape_fault(alone, {"scales": ((packed.shape[0],), FLOATS)})
        return wrong or layout_named(cls.within).fault(cls._inner(packed)) or _scale_fault(packed)

    @classmethod
    def numbers(cls, packed: Packed) -> Tensor:
        return packed.tensors["values"]

    @classmethod
    def grid(cls, packed: Packed) -> Grid:
        return Grid(8, 0, packed.tensors["scales"].detach().float()[:, None])


class GroupCoded(Layout):
    """Integers of few bits with a scale for each group of neighbouring inputs; groups of zeros may be left out.

    Tensors: `codes` uint8 [n, group·bits / 8], one row a stored group, in reading order; `scales` [n]; `zeros`, where
    the grid has zero points, uint8 [ceil(n / 2)], four bits each, lower half first; and where groups are left out
    `bitmask` uint8 [O, ceil(G / 8)], bit b of byte j standing for group 8j + b. A code c stands for k = c − z. With
    four bits, byte j of a group holds code j in its lower half and code j + group/2 in its upper half; with three bits
    the codes follow each other bit by bit, least significant first.
    """

    coded = True
    bits: ClassVar[int] = 4
    sparse: ClassVar[bool] = False
    examples: ClassVar = ({"group": 16}, {"group": 32})

    @classmethod
    def refuse(cls, w_OI: Tensor, *, grid: Grid | None = None, **params: int) -> str | None:
        wrong = _misfit(w_OI, grid, cls.bits, False)
        if wrong or grid is None:
            return wrong
        if params["group"] != grid.group:
            return f"its grid has groups of {grid.group}, not {params['group']}"
        return f"{grid.group} is no multiple of 16" if grid.group % 16 else None

    @classmethod
    def candidates(cls, w_OI: Tensor, *, grid: Grid | None = None) -> list[dict[str, int]]:
        return [] if grid is None or grid.bits != cls.bits else [{"group": grid.group}]

    @classmethod
    def _kept(cls, w_OI: Tensor, group: int) -> Tensor:
        """bool [O, G]: the groups that are stored."""
        o, i = w_OI.shape
        if not cls.sparse:
            return torch.ones(o, i // group, dtype=torch.bool, device=w_OI.device)
        return (
            (w_OI != 0).unflatten(-1, (i // group, group)).any(-1) if w_OI.numel() else torch.zeros(o, i // group) > 0
        )

    @classmethod
    def stored_bytes(cls, w_OI: Tensor, *, grid: Grid | None = None, **params: int) -> int:
        group, (o, i) = params["group"], w_OI.shape
        n = int(cls._kept(w_OI, group).sum())
        zeros = math.ceil(n / 2) if grid is not None and grid.zeros is not None else 0
        mask = o * math.ceil(i // group / 8) if cls.sparse else 0
        return n * (group * cls.bits // 8 + w_OI.element_size()) + zeros + mask

    @classmethod
    def pack(cls, w_OI: Tensor, *, grid: Grid | None = None, **params: int) -> Packed:
        assert grid is not None
        kept = cls._kept(w_OI, grid.group)
        levels = grid.levels(w_OI).unflatten(-1, (kept.shape[1], grid.group))[kept].to(torch.int16)
        zeros = None if grid.zeros is None else grid.zeros.to(w_OI.device)[kept]
        levels += (1 << (cls.bits - 1)) if zeros is None else zeros[:, None].to(torch.int16)
        tensors = {
            "codes": _to_bytes(levels.to(torch.uint8), cls.bits),
            "scales": grid.scales.to(w_OI.device, w_OI.dtype)[kept],
        }
        if zeros is not None:
            tensors["zeros"] = _halves(zeros)
        if cls.sparse:
            tensors["bitmask"] = pack_bits(kept)
        name = f"int{cls.bits}{_tail('bitmask' if cls.sparse else 'dense')}"
        return Packed(name, (w_OI.shape[0], w_OI.shape[1]), w_OI.dtype, tensors, {"group": grid.group})

    @classmethod
    def numbers(cls, packed: Packed) -> Tensor:
        codes = _from_bytes(packed.tensors["codes"], cls.bits).to(torch.int8)
        zeros = packed.tensors.get("zeros")
        if zeros is None:
            return codes - (1 << (cls.bits - 1))
        return codes - _from_halves(zeros, codes.shape[0]).to(torch.int8)[:, None]

    @classmethod
    def _stored(cls, packed: Packed) -> Tensor:
        """bool [O G]: which groups are stored."""
        (o, i), group = packed.shape, packed.params["group"]
        if not cls.sparse:
            return torch.ones(o * (i // group), dtype=torch.bool, device=packed.device)
        return unpack_bits(packed.tensors["bitmask"], i // group).flatten()

    @classmethod
    def unpack(cls, packed: Packed) -> Tensor:
        (o, i), group = packed.shape, packed.params["group"]
        w = (cls.numbers(packed).float() * packed.tensors["scales"].float()[:, None] + 0.0).to(packed.dtype)
        if not cls.sparse:
            return w.view(o, i)
        where = cls._stored(packed).nonzero().squeeze(1)
        out = torch.zeros(o * (i // group), group, dtype=packed.dtype, device=packed.device)
        return out.index_put((where,), w).view(o, i)

    @classmethod
    def fault(cls, packed: Packed) -> str | None:
        (o, i), group = packed.shape, packed.params.get("group", 0)
        if group < 16 or group % 16 or i % group:
            return f"groups of {group} do not fit the width {i}"
        n = None if cls.sparse else o * (i // group)
        expected: dict[str, Any] = {
            "codes": ((n, group * cls.bits // 8), (torch.uint8,)),
            "scales": ((n,), FLOATS),
        }
        if "zeros" in packed.tensors:
            expected["zeros"] = ((None,), (torch.uint8,))
        if cls.sparse:
            expected["bitmask"] = ((o, math.ceil(i // group / 8)), (torch.uint8,))
        wrong = shape_fault(packed, expected)
        return wrong or cls._counts(packed, i // group) or _scale_fault(packed)

    @classmethod
    def _counts(cls, packed: Packed, groups: int) -> str | None:
        stored, scales = packed.tensors["codes"].shape[0], packed.tensors["scales"].shape[0]
        if stored != scales:
            return f"{stored} groups and {scales} scales are stored"
        if "zeros" in packed.tensors and packed.tensors["zeros"].shape[0] != math.ceil(stored / 2):
            return f"{stored} groups and {packed.tensors['zeros'].shape[0]} bytes of zero points are stored"
        if not cls.sparse:
            return None
        bitmask = packed.tensors["bitmask"]
        if groups % 8 and bool((bitmask[:, -1] >> (groups % 8)).any()):
            return "its bitmask marks groups beyond the width"
        marked = count_bits(bitmask)
        return None if marked == stored else f"its bitmask marks {marked} groups and {stored} are stored"

    @classmethod
    def grid(cls, packed: Packed) -> Grid:
        (o, i), group = packed.shape, packed.params["group"]
        where = cls._stored(packed)
        scales = torch.zeros(where.shape, device=packed.device)
        scales[where] = packed.tensors["scales"].detach().float()
        zeros = None
        if "zeros" in packed.tensors:
            zeros = torch.zeros(where.shape, dtype=torch.uint8, device=packed.device)
            zeros[where] = _from_halves(packed.tensors["zeros"], packed.tensors["codes"].shape[0])
            zeros = zeros.view(o, i // group)
        return Grid(cls.bits, group, scales.view(o, i // group), zeros)


def _halves(codes: Tensor) -> Tensor:
    """uint8 [n] of four bits as [ceil(n / 2)], lower half first."""
    padded = torch.nn.functional.pad(codes, (0, codes.shape[0] % 2)).view(-1, 2)
    return padded[:, 0] | (padded[:, 1] << 4)


def _from_halves(packed: Tensor, n: int) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], 1).flatten()[:n]


def _to_bytes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [n, group] as bytes [n, group·bits / 8]."""
    if bits == 4:
        low, high = codes.chunk(2, dim=1)
        return low | (high << 4)
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    return pack_bits(((codes.unsqueeze(-1) >> shifts) & 1).flatten(1))


def _from_bytes(packed: Tensor, bits: int) -> Tensor:
    if bits == 4:
        return torch.cat([packed & 15, packed >> 4], dim=1)
    each = unpack_bits(packed, packed.shape[1] * 8).unflatten(-1, (-1, bits)).to(torch.uint8)
    shifts = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (each << shifts).sum(-1, dtype=torch.uint8)


def _tail(within: str) -> str:
    return "" if within == "dense" else f"-{within}"


def _register() -> None:
    for within in ("dense", "bitmask", "nm", "block"):
        what = "every number" if within == "dense" else f"numbers where the layout `{within}` puts them"
        text = f"int8 with one scale a row: {what}.\n\n{RowCoded.__doc__}"
        examples = {"nm": ({"n": 2, "m": 4},), "block": ({"r": 4, "c": 8},)}.get(within, ({},))
        made = type(f"Int8_{within}", (RowCoded,), {"within": within, "examples": examples, "__doc__": text})
        registry.layout(f"int8{_tail(within)}")(made)
    for bits in (3, 4):
        for sparse in (False, True):
            what = "without the groups that are all zero" if sparse else "every group"
            text = f"{bits}-bit integers with one scale for each group of inputs, {what}.\n\n{GroupCoded.__doc__}"
            made = type(f"Int{bits}", (GroupCoded,), {"bits": bits, "sparse": sparse, "__doc__": text})
            registry.layout(f"int{bits}{_tail('bitmask' if sparse else 'dense')}")(made)


_register()
