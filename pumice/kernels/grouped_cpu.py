"""C++ backend of grouped products (`kernels/cpu/grouped.h`): weights stay where they lie, rows are gathered in place.

Legend: R rows of x, O outputs, I inputs, E experts, A assignments sorted by expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pumice.core.dispatch import Backend, Call, Run, limits, register
from pumice.core.errors import PumiceError
from pumice.kernels.cpu_backend import CODES, PRODUCTS, missing, native

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "clamped_swish")
STORE, SCATTER, ACTIVATE, GATE, ADD = range(5)


@dataclass(frozen=True)
class Finish:
    """What becomes of the products of one stage.

    `first` and `step`: the gate of column c is output `c · step`, its partner `c · step + first`. `alpha` and `limit`
    are those of `clamped_swish`: `(clamp(up) + 1) · gate · sigmoid(alpha · gate)`, both clamped to the limit.
    """

    kind: int = STORE
    act: int = 0
    first: int = 0
    step: int = 1
    alpha: float = 0.0
    limit: float = 0.0


def places(gate: str, width: int) -> tuple[int, int]:
    """`first` and `step` of a hidden layer of `width` columns; without gates `first` is 0."""
    return {"none": (0, 1), "halves": (width, 1), "pairs": (1, 2)}[gate]


PLAIN = Finish()
AMX_ROWS = 32
"""Rows an expert from which bf16 is left to oneDNN where the CPU has AMX; not measured, as no such CPU was at hand."""


def address(tensor: Tensor | None) -> int:
    """Where it lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def stage(
    x: Tensor,
    weight_EOI: Tensor,
    offsets_E1: Tensor,
    bias_EO: Tensor | None = None,
    finish: Finish = PLAIN,
    gather_A: Tensor | None = None,
    scatter_A: Tensor | None = None,
    scale_A: Tensor | None = None,
    rows: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """One gather → product → finish; the result is [A, columns], or [rows, columns] with `scatter_A`.

    It is written to `out` (contiguous) where that is given. With `scatter_A` that is float32, and added to.

    Raises:
        PumiceError: a plan that points outside of the tensors.
    """
    experts, outputs, inputs = weight_EOI.shape
    assignments = x.shape[0] if gather_A is None else gather_A.shape[0]
    columns = outputs // 2 if finish.kind == GATE else outputs
    if x.stride(1) != 1:
        x = x.contiguous()
    if 1 not in weight_EOI.stride()[1:]:
        weight_EOI = weight_EOI.contiguous()
    offsets_E1 = offsets_E1.contiguous()
    gather_A = None if gather_A is None else gather_A.contiguous()
    scatter_A = None if scatter_A is None else scatter_A.contiguous()
    scale_A = None if scale_A is None else scale_A.to(torch.float32).contiguous()
    bias_EO = None if bias_EO is None else bias_EO.to(x.dtype).contiguous()
    y = torch.empty((assignments if scatter_A is None else rows, columns), dtype=x.dtype) if out is None else out
    if y.numel() == 0:
        return y
    if assignments == 0:
        return y.zero_() if out is None else y
    kind = finish.kind if scatter_A is None else SCATTER if out is None else ADD
    try:
        native.stage(
            *(x.data_ptr(), x.shape[0], x.stride(0), address(gather_A), offsets_E1.data_ptr(), experts, inputs),
            *(weight_EOI.data_ptr(), *weight_EOI.stride(), address(bias_EO), columns, finish.first, finish.step),
            *(kind, finish.act, round(finish.alpha * 1e6), round(finish.limit * 1e6)),
            *(address(scale_A), address(scatter_A), y.data_ptr(), y.shape[0], assignments, CODES[x.dtype]),
            torch.get_num_threads(),
        )
    except ValueError as error:
        raise PumiceError(f"plan of {assignments} assignments to {experts} experts: {error}.") from None
    return y


def outer(
    g: Tensor,
    x: Tensor,
    offsets_E1: Tensor,
    g_rows_A: Tensor | None,
    x_rows_A: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.grouped_outer`, into `out` (contiguous) where that is given; rows are read where they lie.

    Raises:
        PumiceError: a plan that points outside of the tensors.
    """
    experts, assignments = offsets_E1.shape[0] - 1, g.shape[0] if g_rows_A is None else g_rows_A.shape[0]
    g, x = g if g.stride(1) == 1 else g.contiguous(), x if x.stride(1) == 1 else x.contiguous()
    offsets_E1 = offsets_E1.contiguous()
    g_rows_A = None if g_rows_A is None else g_rows_A.contiguous()
    x_rows_A = None if x_rows_A is None else x_rows_A.contiguous()
    y = torch.empty((experts, g.shape[1], x.shape[1]), dtype=x.dtype) if out is None else out
    if y.numel() == 0:
        return y
    try:
        native.outer(
            *(g.data_ptr(), g.shape[0], g.stride(0), address(g_rows_A)),
            *(x.data_ptr(), x.shape[0], x.stride(0), address(x_rows_A), offsets_E1.data_ptr()),
            *(experts, *y.shape[1:], y.data_ptr(), assignments, CODES[x.dtype], torch.get_num_threads()),
        )
    except ValueError as error:
        raise PumiceError(f"plan of {assignments} assignments to {experts} experts: {error}.") from None
    return y


def refuse(call: Call) -> str | None:
    """Why the C++ kernels will not run a grouped product, or None."""
    reason = limits(call, devices=("cpu",), dtypes=PRODUCTS) or missing()
    if reason is not None or call.dtype is not torch.bfloat16 or "amx_bf16" not in native.features():
        return reason
    rows = call.rows // max(call.params["experts"], 1)
    if rows < AMX_ROWS:
        return None
    return f"{rows} rows an expert on a CPU with AMX: oneDNN multiplies them by tiles, these kernels do not"


def _prepare(weight_EOI: Any, bias_EO: Tensor | None) -> Run:
    def run(
        x: Tensor,
        offsets_E1: Tensor,
        gather_A: Tensor | None = None,
        scatter_A: Tensor | None = None,
        scale_A: Tensor | None = None,
        rows: int = 0,
    ) -> Tensor:
        return stage(x, weight_EOI, offsets_E1, bias_EO, PLAIN, gather_A, scatter_A, scale_A, rows)

    return run


register(Backend("native", "grouped_linear", "dense", refuse, _prepare, 30, "C++: no copies, threads share columns"))
register(Backend("native", "grouped_outer", "dense", refuse, lambda _, __: outer, 30, "C++: no copies"))
