"""Grouped products in Triton: rows are gathered where they are loaded and summed where they are stored.

Nothing is copied or padded: a tile is a run of assignments of one expert, masked at its end. How many tiles there are
at most is known from the sizes alone, so that the host waits for nothing; tiles too many end at once.
Legend: R rows of x, O outputs, I inputs, E experts, A assignments sorted by expert, N tiles.
"""

# Triton reads the annotations of its kernels, and knows no Tensor.
# ruff: noqa: ANN001
# Where Triton is not installed, pyright takes this folder for it.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_O, BLOCK_I = 64, 32
LEAST_A, MOST_A = 16, 64


@triton.jit
def _linear_kernel(
    x,
    weight,
    bias,
    out,
    gather,
    scatter,
    scale,
    expert_N,
    first_N,
    offsets_E1,
    experts,
    outputs,
    inputs,
    x_row,
    x_column,
    weight_expert,
    weight_output,
    weight_input,
    TILE_A: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of assignments of one expert, by one tile of outputs."""
    tile = tl.program_id(0)
    expert = tl.load(expert_N + tile).to(tl.int64)
    if expert >= experts:
        return
    place = tl.load(first_N + tile) + tl.arange(0, TILE_A)
    inside = place < tl.load(offsets_E1 + expert + 1)
    row = place
    if gather is not None:
        row = tl.load(gather + place, mask=inside, other=0)
    o = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    wanted = o < outputs
    sums = tl.zeros((TILE_A, TILE_O), dtype=tl.float32)
    for start in range(0, inputs, TILE_I):
        i = start + tl.arange(0, TILE_I)
        there = i < inputs
        x_AI = tl.load(
            x + row[:, None] * x_row + i[None, :] * x_column, mask=inside[:, None] & there[None, :], other=0.0
        )
        w_IO = tl.load(
            weight + expert * weight_expert + i[:, None] * weight_input + o[None, :] * weight_output,
            mask=there[:, None] & wanted[None, :],
            other=0.0,
        )
        if WIDE:
            x_AI, w_IO = x_AI.to(tl.float32), w_IO.to(tl.float32)
        sums = tl.dot(x_AI, w_IO, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + expert * outputs + o, mask=wanted, other=0.0)[None, :].to(tl.float32)
    if scale is not None:
        sums *= tl.load(scale + place, mask=inside, other=0.0)[:, None].to(tl.float32)
    keep = inside[:, None] & wanted[None, :]
    if scatter is not None:
        target = tl.load(scatter + place, mask=inside, other=0)
        tl.atomic_add(out + target[:, None] * outputs + o[None, :], sums, mask=keep)
    else:
        tl.store(out + place[:, None] * outputs + o[None, :], sums.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _outer_kernel(
    g,
    x,
    out,
    g_rows,
    x_rows,
    offsets_E1,
    outputs,
    inputs,
    g_row,
    g_column,
    x_row,
    x_column,
    TILE_A: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile [O, I] of one expert, summed over all its assignments."""
    expert = tl.program_id(2).to(tl.int64)
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    i = tl.program_id(1) * TILE_I + tl.arange(0, TILE_I)
    start, end = tl.load(offsets_E1 + expert), tl.load(offsets_E1 + expert + 1)
    sums = tl.zeros((TILE_O, TILE_I), dtype=tl.float32)
    for first in range(start, end, TILE_A):
        place = first + tl.arange(0, TILE_A)
        inside = place < end
        from_g, from_x = place, place
        if g_rows is not None:
            from_g = tl.load(g_rows + place, mask=inside, other=0)
        if x_rows is not None:
            from_x = tl.load(x_rows + place, mask=inside, other=0)
        g_OA = tl.load(
            g + from_g[None, :] * g_row + o[:, None] * g_column,
            mask=inside[None, :] & (o < outputs)[:, None],
            other=0.0,
        )
        x_AI = tl.load(
            x + from_x[:, None] * x_row + i[None, :] * x_column,
            mask=inside[:, None] & (i < inputs)[None, :],
            other=0.0,
        )
        if WIDE:
            g_OA, x_AI = g_OA.to(tl.float32), x_AI.to(tl.float32)
        sums = tl.dot(g_OA, x_AI, sums, input_precision="ieee")
    at = expert * outputs * inputs + o[:, None] * inputs + i[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(o < outputs)[:, None] & (i < inputs)[None, :])


def _wide(dtype: torch.dtype) -> bool:
    """Triton's interpreter multiplies the bare bits of bfloat16 and cuts where it should round: float32 is used there."""
    return dtype is torch.bfloat16 and bool(triton.knobs.runtime.interpret)


def _tile(rows: int, experts: int) -> int:
    """Assignments of a tile: about an expert's share, a power of two."""
    return min(MOST_A, max(LEAST_A, triton.next_power_of_2(max(1, rows // max(experts, 1)))))


def tiles(offsets_E1: Tensor, assignments: int, each: int) -> tuple[Tensor, Tensor]:
    """Expert and first assignment of every tile, N of them, made without waiting for the device.

    Tiles that are too many have expert E.
    """
    experts = offsets_E1.shape[0] - 1
    until_E1 = torch.nn.functional.pad(((offsets_E1.diff() + each - 1) // each).cumsum(0), (1, 0))
    place_N = torch.arange(assignments // each + experts, device=offsets_E1.device)
    expert_N = torch.searchsorted(until_E1, place_N, right=True) - 1
    known_N = expert_N.clamp(max=experts - 1)
    return expert_N, offsets_E1[known_N] + (place_N - until_E1[known_N]) * each


def linear(
    x: Tensor,
    weight_EOI: Tensor,
    offsets_E1: Tensor,
    bias_EO: Tensor | None = None,
    gather_A: Tensor | None = None,
    scatter_A: Tensor | None = None,
    scale_A: Tensor | None = None,
    rows: int = 0,
) -> Tensor:
    """`reference.grouped_linear`, O(A O I) and no more memory than its result (float32 where rows are summed).

    Sums over a row's assignments are made by atomic additions, whose order, and so the last bits, can differ from run
    to run.
    """
    experts, outputs, inputs = weight_EOI.shape
    assignments = x.shape[0] if gather_A is None else gather_A.shape[0]
    if scatter_A is None:
        out = x.new_empty(assignments, outputs, dtype=torch.float32 if _wide(x.dtype) else x.dtype)
    else:
        out = x.new_zeros(rows, outputs, dtype=torch.float32)
    each = _tile(assignments, experts)
    expert_N, first_N = tiles(offsets_E1, assignments, each)
    grid = (expert_N.shape[0], triton.cdiv(outputs, BLOCK_O))
    if out.numel() and assignments:
        given: list[Any] = [one if one is None else one.contiguous() for one in (bias_EO, gather_A, scatter_A, scale_A)]
        kernel: Any = _linear_kernel
        kernel[grid](
            *(x, weight_EOI, given[0], out, *given[1:], expert_N, first_N, offsets_E1, experts, outputs, inputs),
            *(*x.stride(), *weight_EOI.stride()),
            TILE_A=each,
            TILE_O=BLOCK_O,
            TILE_I=BLOCK_I,
            WIDE=_wide(x.dtype),
        )
    return out.to(x.dtype)


def outer(g: Tensor, x: Tensor, offsets_E1: Tensor, g_rows_A: Tensor | None, x_rows_A: Tensor | None) -> Tensor:
    """`reference.grouped_outer`, O(A O I) and no more memory than its result."""
    experts, outputs, inputs = offsets_E1.shape[0] - 1, g.shape[1], x.shape[1]
    out_EOI = g.new_empty(experts, outputs, inputs, dtype=torch.float32 if _wide(g.dtype) else g.dtype)
    grid = (triton.cdiv(outputs, BLOCK_O), triton.cdiv(inputs, BLOCK_O), experts)
    if out_EOI.numel():
        rows: list[Any] = [one if one is None else one.contiguous() for one in (g_rows_A, x_rows_A)]
        kernel: Any = _outer_kernel
        kernel[grid](
            *(g, x, out_EOI, *rows, offsets_E1, outputs, inputs, *g.stride(), *x.stride()),
            TILE_A=BLOCK_I,
            TILE_O=BLOCK_O,
            TILE_I=BLOCK_O,
            WIDE=_wide(x.dtype),
        )
    return out_EOI.to(g.dtype)
