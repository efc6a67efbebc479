"""Compressed sparse rows on the CPU: in tiles (`csr-tiles`), or brought into them when a layer is bound (`csr`), then run by C++
that only multiplies nonzeros.

A tile is 256 columns wide, so that an offset in it is a byte; the rows of a chunk stand in it sixteen by sixteen, those of
about the same length together (`kernels/cpu/tiles.h`). Few rows of x look their columns up in registers, a row of the
matrix to each lane: that is bound by memory, at three bytes a weight. More rows of x are transposed, and each stored
weight is multiplied with sixteen or thirty-two of them: that is bound by arithmetic and by the first cache.
The tiles of `csr` are a copy, beside the stored matrix; `pack` puts `csr-tiles` in its place.
Legend: R rows of x, O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pumice.core.dispatch import Backend, Call, Run, limits, register
from pumice.core.errors import PumiceError
from pumice.kernels import cpu_backend
from pumice.kernels.cpu_backend import CODES, PRODUCTS
from pumice.kernels.derived import derived
from pumice.kernels.planned import streamed
from pumice.weights.layouts.base import Packed
from pumice.weights.layouts.lanes import ROWS, Places, chunk_height
from pumice.weights.layouts.tiles import EACH, TILE, CsrTiles

IN_TILES = ("csr", "csr-tiles")


class Tiles(NamedTuple):
    """What the kernels read; `height` rows to a chunk."""

    values: Tensor
    columns: Tensor
    order: Tensor
    steps: Tensor
    starts: Tensor
    height: int

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self if isinstance(t, Tensor))


def tiles_of(packed: Packed) -> Tiles:
    """A CSR matrix in tiles: its own tensors where it is stored in them, else a copy, kept while its values live and are unchanged.

    Raises:
        ValueError: columns or row starts that point outside of the matrix, or steps that do not fit.
    """
    stored = packed.tensors
    if packed.layout == "csr-tiles":
        order, steps = stored["order"], stored["steps"]
        starts = derived((steps, order), lambda: _starts(packed))
        values, offsets, order, steps = (
            tensor.detach().contiguous() for tensor in (stored["values"], stored["offsets"], order, steps)
        )
        if not values.numel() == offsets.numel() == int(starts[-1]):
            raise ValueError(f"{values.numel()} values and {offsets.numel()} offsets in {int(starts[-1])} places")
        return Tiles(values, offsets, order, steps, starts, chunk_height(packed.shape[0]))
    sources = [stored["values"], stored["columns"], stored["row_starts"]]
    return derived(sources, lambda: _tiles(packed, *(tensor.detach().contiguous() for tensor in sources)))


def _starts(packed: Packed) -> Tensor:
    wrong = CsrTiles.misshapen(packed)
    if wrong is not None:
        raise ValueError(wrong)
    _, tiles, height = packed.tensors["order"].shape
    of_slices = Places(packed.tensors["order"], packed.tensors["steps"]).starts() * ROWS * EACH
    return of_slices[:: height // ROWS].contiguous() if tiles else of_slices[:1]


def _tiles(packed: Packed, values: Tensor, columns: Tensor, row_starts: Tensor) -> Tiles:
    outputs, inputs = packed.shape
    if values.numel() != columns.numel() or row_starts.shape != (outputs + 1,):
        raise ValueError(f"{values.numel()} values and {columns.numel()} columns in {row_starts.numel() - 1} rows")
    height, native = chunk_height(outputs), cpu_backend.native
    groups = -(-outputs // height) * -(-inputs // TILE)
    order = torch.empty(groups, height, dtype=torch.uint8)
    steps = torch.empty(groups, height // ROWS, dtype=torch.uint8)
    starts = torch.zeros(groups + 1, dtype=torch.int64)
    wide = int(columns.dtype is not torch.uint16)
    matrix = (columns.data_ptr(), wide, row_starts.data_ptr(), outputs, inputs, values.numel())
    where = (order.data_ptr(), steps.data_ptr(), starts.data_ptr())
    count = native.lay_out_tiles(*matrix, height, *where)
    made = torch.empty(count, dtype=values.dtype), torch.empty(count, dtype=torch.uint8)
    ends = made[0].data_ptr(), made[1].data_ptr(), torch.get_num_threads()
    native.fill_tiles(*matrix, values.data_ptr(), height, *where, CODES[packed.dtype], *ends)
    return Tiles(*made, order, steps, starts, height)


class TilePlan:
    """A CSR matrix as the kernels take it, and what they point into."""

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        native: Any = cpu_backend.native
        if native is None:
            raise PumiceError(f"layout={packed.layout!r} has no C++ kernel here: {cpu_backend.missing()}.")
        try:
            tiles = tiles_of(packed)
        except ValueError as error:
            raise PumiceError(f"layout={packed.layout!r} of shape {packed.shape} is damaged: {error}.") from None
        bias_O = None if bias is None else bias.detach().to(torch.float32).contiguous()
        self.shape, self.dtype, self.keep = packed.shape, packed.dtype, (tiles, bias_O)
        tensors = [tensor.data_ptr() for tensor in tiles if isinstance(tensor, Tensor)]
        address = 0 if bias_O is None else bias_O.data_ptr()
        self.handle = native.plan_tiles(*tensors, address, *packed.shape, tiles.height, CODES[packed.dtype])


def _prepare(packed: Packed, bias: Tensor | None) -> Run:
    return streamed(TilePlan(packed, bias), cpu_backend.native.run_tiles)


def _refuse(call: Call) -> str | None:
    return limits(call, devices=("cpu",), dtypes=PRODUCTS) or cpu_backend.missing()


def _extra(packed: Packed) -> int:
    return tiles_of(packed).nbytes


register(
    Backend("tiles", "linear", "csr", _refuse, _prepare, 30, "C++: a copy in tiles, only nonzeros multiplied", _extra)
)
register(Backend("tiles", "linear", "csr-tiles", _refuse, _prepare, 30, "C++: only nonzeros multiplied"))
