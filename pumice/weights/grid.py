"""Grids of integers: which scale each weight is a multiple of, how a grid is fitted, and where a layer keeps its own.

Shapes: O outputs, I inputs, G groups of a row (one where the whole row shares a scale), C columns of one group.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.view import WeightView

SLICE = 1 << 20
"""Weights rounded at once, so that what lies between is in the cache."""
KEPT = "_pumice_grids"
"""Attribute of a module that holds the grids of its weights: {(parameter, expert): Grid}."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Every weight of a matrix is an integer times the scale of its group: w = s·k.

    `scales` [O, G] float32, numbers that bfloat16 holds exactly (a negative one is allowed: it turns the range of k
    around); `zeros` uint8 [O, G] or None. With `bits` b, k runs from −z to 2ᵇ−1−z, z being the zero point, 2ᵇ⁻¹ where
    there is none. `group` is the number of neighbouring columns that share a scale, 0 for the whole row.
    """

    bits: int
    group: int
    scales: Tensor
    zeros: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_last"}

    @property
    def rows(self) -> int:
        return self.scales.shape[0]

    def grouped(self, w_OI: Tensor) -> Tensor:
        """The matrix as [O, G, C]."""
        return w_OI.unflatten(-1, (self.scales.shape[1], -1)) if w_OI.shape[1] else w_OI[:, :, None][:, :0]

    def levels(self, w_OI: Tensor) -> Tensor:
        """The integers k that come nearest, int8 [O, I] (a weight that is not finite becomes 0); to be read only."""
        if not w_OI.numel():
            return torch.zeros(w_OI.shape, dtype=torch.int8, device=w_OI.device)
        # Every layout asks for them while one is chosen. They are kept as long as the matrix lives and is unchanged.
        last: tuple[weakref.ref[Tensor], int, Tensor] | None = self.__dict__.get("_last")
        version = -1 if w_OI.is_inference() else w_OI._version
        if last is not None and last[0]() is w_OI and last[1] == version >= 0:
            return last[2]
        found = torch.empty(w_OI.shape, dtype=torch.int8, device=w_OI.device)
        height = max(1, SLICE // w_OI.shape[1])
        for rows in (slice(a, a + height) for a in range(0, w_OI.shape[0], height)):
            zeros = None if self.zeros is None else self.zeros[rows].to(w_OI.device)[..., None].float()
            w = self.grouped(w_OI[rows].float())
            found[rows] = nearest(w, self.scales[rows].to(w_OI.device)[..., None], zeros, self.bits).flatten(1)
        here = self.__dict__
        here["_last"] = (weakref.ref(w_OI, lambda _: here.pop("_last", None)), version, found)
        return found

    def matrix(self, levels_OI: Tensor, dtype: torch.dtype) -> Tensor:
        """w = s·k, multiplied in float32 and rounded once to `dtype`."""
        if not levels_OI.numel():
            return levels_OI.to(dtype)
        scales = self.scales.to(levels_OI.device)[..., None]
        # Zero times a negative scale is a negative zero, which no sparse layout keeps.
        return (self.grouped(levels_OI.float()) * scales + 0.0).flatten(1).to(dtype)

    def snap(self, w_OI: Tensor) -> Tensor:
        """The matrix rounded to the grid, same dtype."""
        return self.matrix(self.levels(w_OI), w_OI.dtype)

    def fits(self, w_OI: Tensor) -> bool:
        """Whether a matrix lies on the grid exactly, so that storing its integers loses nothing."""
        if w_OI.shape[0] != self.rows or (self.group and w_OI.shape[1] != self.group * self.scales.shape[1]):
            return False
        if w_OI.dtype == torch.float16 and not torch.equal(self.scales.half().float(), self.scales):
            return False
        levels, height = self.levels(w_OI), max(1, SLICE // max(1, w_OI.shape[1]))
        slices = [slice(a, a + height) for a in range(0, w_OI.shape[0], height)]
        return all(torch.equal(self.part(rows).matrix(levels[rows], w_OI.dtype), w_OI[rows]) for rows in slices)

    def belongs(self, w_OI: Tensor) -> bool:
        """Whether a matrix came from this grid: it lies on it, or was rounded to half precision and widened again."""
        if self.fits(w_OI):
            return True
        halves = (w_OI.to(dtype) for dtype in (torch.bfloat16, torch.float16))
        return any(torch.equal(half.to(w_OI.dtype), w_OI) and self.fits(half) for half in halves)

    def part(self, rows: slice) -> Grid:
        """The grid of some rows."""
        return Grid(self.bits, self.group, self.scales[rows], None if self.zeros is None else self.zeros[rows])


def stacked(grids: Iterable[Grid]) -> Grid:
    """One grid of matrices that lie on top of each other (experts, groups of a convolution)."""
    parts = list(grids)
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Grid(
        parts[0].bits,
        parts[0].group,
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
    )


def nearest(w: Tensor, scale: Tensor, zero: Tensor | float | None, bits: int) -> Tensor:
    """Integers k with s·k nearest to w within the range of the bits, float32; broadcast over `scale` and `zero`."""
    zero = float(1 << (bits - 1)) if zero is None else zero
    top = float((1 << bits) - 1)
    k = torch.where(scale != 0, w / scale, 0.0).round()
    if isinstance(zero, Tensor):
        return torch.maximum(torch.minimum(k, top - zero), -zero).nan_to_num_(0.0)
    return k.clamp(-zero, top - zero).nan_to_num_(0.0)


@dataclass(frozen=True)
class Coding:
    """How the grid of a matrix is chosen: bits, columns to a group, with or without zero points.

    Symmetric groups get a signed scale that puts their largest weight on −2ᵇ⁻¹, the end of the range that has one level
    more. With `search` steps the range is then narrowed (to 65 % of it at most) where that lowers the squared error,
    each column weighted by what it is worth.
    """

    name: str
    bits: int
    group: int = 0
    zero: bool = False
    search: int = 0

    def __post_init__(self) -> None:
        # Levels are held as int8, and with a zero point they reach from -z to 2^b - 1 - z.
        if not 2 <= self.bits <= 8 - self.zero:
            most = "7 bits, with zero points" if self.zero else "8 bits"
            raise PumiceError(f"values={self.name!r} of {self.bits} bits: integers have 2 to {most}.")

    def check(self, name: str, width: int) -> None:
        """PumiceError naming the layer where the groups do not divide its width."""
        if self.group and (self.group % 16 or width % self.group):
            reason = f"{self.group} is no multiple of 16" if self.group % 16 else f"it has {width} inputs"
            raise PumiceError(
                f"values={self.name!r} in groups of {self.group} do not fit layer {name}: {reason}; use another group, "
                f"or leave the layer out with ignore={name!r}."
            )

    def columns(self, w: Tensor, worth: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point [...] of groups w [..., C]; `worth` [..., C] or [C] weights the columns' errors."""
        levels = float((1 << self.bits) - 1)
        if self.zero:
            low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
            full = (high - low) / levels
        else:
            biggest = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
            low, full = None, -biggest / float(1 << (self.bits - 1))
        best = None
        for step in range(max(self.search, 1)):
            scale = storable(full * (1 - 0.35 * step / max(self.search - 1, 1)))
            zero = None
            if low is not None:
                zero = torch.where(scale != 0, -low / scale, 0.0).round().clamp(0, levels)
            rounded = nearest(w, scale[..., None], None if zero is None else zero[..., None], self.bits)
            error = (rounded * scale[..., None] - w).square_()
            loss = (error if worth is None else error * worth).sum(-1)
            if best is None:
                best = loss, scale, zero
                continue
            better = loss < best[0]
            chosen = None if zero is None or best[2] is None else torch.where(better, zero, best[2])
            best = torch.where(better, loss, best[0]), torch.where(better, scale, best[1]), chosen
        assert best is not None
        return best[1], best[2]

    def grid(self, w_OI: Tensor, worth_I: Tensor | None = None) -> Grid:
        """The grid that round-to-nearest takes for a matrix; `worth_I` weights the inputs (E[x²], say)."""
        o, i = w_OI.shape
        if not w_OI.numel():
            return Grid(self.bits, self.group, torch.zeros(o, i // self.group if self.group else 1))
        width, height = self.group or i, max(1, SLICE // i)
        worth = None if worth_I is None else worth_I.view(i // width, width)
        slices = (w_OI[a : a + height].float().unflatten(-1, (i // width, width)) for a in range(0, o, height))
        scales, zeros = zip(*(self.columns(groups, worth) for groups in slices), strict=True)
        stored = None if zeros[0] is None else torch.cat(zeros).to(torch.uint8)
        return Grid(self.bits, self.group, torch.cat(scales), stored)


def storable(scale: Tensor) -> Tensor:
    """Scales as they are stored: sixteen bits, so that bfloat16, float16 and float32 models hold the same number."""
    return scale.to(torch.bfloat16).float()


def keep(view: WeightView, grid: Grid | None) -> None:
    """Note on a layer which grid its weight lies on (None forgets it); `save` and `pack` store the integers then."""
    grids: dict[tuple[str, int | None], Grid] = view.module.__dict__.setdefault(KEPT, {})
    grids.pop((view.parameter, view.expert), None)
    if grid is not None:
        grids[view.parameter, view.expert] = grid


def kept(views: Iterable[WeightView]) -> Grid | None:
    """The grid of the views of one parameter, top to bottom, or None where one of them has none."""
    found = [view.module.__dict__.get(KEPT, {}).get((view.parameter, view.expert)) for view in views]
    grids = [grid for grid in found if grid is not None]
    if not grids or len(grids) != len(found) or len({(g.bits, g.group, g.zeros is None) for g in grids}) != 1:
        return None
    return grids[0] if len(grids) == 1 else stacked(grids)


def zeros_of(view: WeightView) -> Tensor:
    """bool [O, I]: the zeros that a layer's storage stands on: all of them, or those of whole groups of its grid.

    A weight that was rounded to zero inside a stored group takes its bits anyway.
    """
    zero = view.matrix() == 0
    grid = kept([view])
    if grid is None or not grid.group or zero.shape[1] != grid.group * grid.scales.shape[1]:
        return zero
    return grid.grouped(zero).all(-1, keepdim=True).expand(-1, -1, grid.group).flatten(1)


def forget(model: nn.Module) -> None:
    """Drop the grids of all layers of a model (their weights stay as they are)."""
    for module in model.modules():
        module.__dict__.pop(KEPT, None)
