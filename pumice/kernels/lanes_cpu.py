"""Four-bit integers in lanes (`weights/layouts/lanes.py`) on CPUs with products of bytes in fours (AVX-512 VNNI).

x is rounded to sixteen bits, with a unit for each of its rows: the largest error is a part in 65534 of the row's largest
magnitude, less than that of bf16 unless one number is a few hundred times as large as most, and rows below 1e-30 count as
zero. Its upper and lower bytes are multiplied with the integers exactly. A row of x with NaN or infinity gives NaN
everywhere.
Legend: R rows of x, O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.core.dispatch import Backend, Call, Run, limits, register
from pumice.core.errors import PumiceError
from pumice.kernels import cpu_backend
from pumice.kernels.derived import derived
from pumice.kernels.planned import panel, streamed
from pumice.weights.layouts.base import Packed
from pumice.weights.layouts.lanes import ROWS, Lanes, Places, SparseLanes

LAYOUTS = {"int4-lanes": Lanes, "int4-bitmask-lanes": SparseLanes}
MOST_ROWS = 16


def row_sums(packed: Packed) -> Tensor:
    """The sum of each row's weights, float32 [O], without writing the matrix out."""
    outputs, group = packed.shape[0], packed.params["group"]
    codes, scales = packed.tensors["codes"], packed.tensors["scales"].detach().double()
    # Two numbers of four bits with a sign in each byte.
    levels = ((codes & 15) ^ 8).to(torch.int16) + ((codes >> 4) ^ 8).to(torch.int16) - 16
    sums = levels.view(-1, group // 8, ROWS, 4).sum((1, 3)) * scales
    if packed.layout == "int4-lanes":
        return sums.view(-(-outputs // ROWS), packed.shape[1] // group, ROWS).sum(1).flatten()[:outputs].float()
    made = Places(packed.tensors["order"], packed.tensors["steps"])
    chunks, _, height = made.order.shape
    return sums.new_zeros(chunks * height).index_add_(0, made.rows().flatten(), sums.flatten())[:outputs].float()


def _starts_and_sums(packed: Packed) -> tuple[Tensor | None, Tensor]:
    """First step of each tile (None where all groups are stored), int64 [C·T + 1], and the rows' sums."""
    stored, starts = packed.tensors, None
    if "order" in stored:
        starts = Places(stored["order"], stored["steps"]).starts()[:: stored["steps"].shape[2]].contiguous()
    return starts, row_sums(packed)


class LanePlan:
    """A matrix in lanes as the kernels take it, and what they point into."""

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        native: Any = cpu_backend.native
        reason = lacking() or (None if packed.dtype is torch.bfloat16 else "it is for bfloat16 only")
        if reason is not None:
            raise PumiceError(f"layout={packed.layout!r} in {packed.dtype} has no C++ kernel here: {reason}.")
        wrong = LAYOUTS[packed.layout].misshapen(packed)
        if wrong is not None:
            raise PumiceError(f"layout={packed.layout!r} of shape {packed.shape} is damaged: {wrong}.")
        sources = list(packed.tensors.values())
        stored = {name: tensor.detach().contiguous() for name, tensor in packed.tensors.items()}
        stored["scales"] = stored["scales"].to(torch.bfloat16)
        bias_O = None if bias is None else bias.detach().to(torch.float32).contiguous()
        self.shape, self.dtype = packed.shape, packed.dtype
        self.height = stored["order"].shape[2] if "order" in stored else ROWS
        try:
            shape, starts, sums = derived(sources, lambda: (packed.shape, *_starts_and_sums(packed)))
            if shape != packed.shape:  # the same tensors under another shape: nothing of theirs is kept
                starts, sums = _starts_and_sums(packed)
            self.keep = (stored, starts, sums, bias_O)
            tensors = [stored.get(name) for name in ("scales", "groups", "order", "steps")]
            where = [0 if t is None else t.data_ptr() for t in (*tensors, starts, sums, bias_O)]
            codes, sizes = stored["codes"], (*packed.shape, packed.params["group"], self.height)
            self.handle = native.plan_lanes(codes.data_ptr(), codes.shape[0], *where, *sizes)
        except ValueError as error:
            raise PumiceError(f"layout={packed.layout!r} of shape {packed.shape} is damaged: {error}.") from None


def lacking() -> str | None:
    """Why the kernels in use have no lanes, or None."""
    reason = cpu_backend.missing()
    if reason is None and not cpu_backend.native.has_lanes():
        return f"the kernels in use ({cpu_backend.native.current()}) have no products of bytes in fours (AVX-512 VNNI)"
    return reason


def _refuse(call: Call) -> str | None:
    return limits(call, devices=("cpu",), dtypes=(torch.bfloat16,)) or lacking()


def _refuse_few(call: Call) -> str | None:
    return limits(call, max_rows=MOST_ROWS, instead="panel") or _refuse(call)


def _prepare_few(packed: Packed, bias: Tensor | None) -> Run:
    return streamed(LanePlan(packed, bias), cpu_backend.native.run_lanes)


def _prepare_many(packed: Packed, bias: Tensor | None) -> Run:
    plan = LanePlan(packed, None)
    return panel(plan, bias, cpu_backend.native.expand_lanes, plan.height)


FEW, MANY = "C++: sixteen rows side by side, bytes in fours, few rows", "C++ expands some rows, then dense product"
for _layout in LAYOUTS:
    register(Backend("lanes", "linear", _layout, _refuse_few, _prepare_few, 30, FEW))
    register(Backend("panel", "linear", _layout, _refuse, _prepare_many, 20, MANY))
