"""The specification: every sparse operation in plain PyTorch. Each kernel must agree with what is here.

Legend: R rows of x, O outputs, I inputs per group, E experts, A assignments sorted by expert.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.core import activation, registry

if TYPE_CHECKING:
    from pumice.weights.layouts.base import Packed


def unpack(packed: Packed) -> Tensor:
    """The dense matrix w_OI that a layout stores, exactly."""
    return registry.layout.get(packed.layout).obj.unpack(packed)


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """`y = x W^T + bias` for any layout: x [..., I] to y [..., O] in x's dtype."""
    return F.linear(x, unpack(packed).to(x.dtype), None if bias is None else bias.to(x.dtype))


def conv2d(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] | str = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """2-D convolution whose weight [O, channels / groups, *kernel_size] is stored flattened as w_OI."""
    weight = unpack(packed).to(x.dtype).unflatten(1, (-1, *kernel_size))
    return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding, dilation, groups)


def positions(packed: Packed) -> Tensor:
    """Where each stored value sits: flat index into w_OI of every element of `values`, in its order, int64; -1 if nowhere.

    A layout is a bijection between its stored values and places of the matrix, so unpacking 1, 2, 3, … instead of
    the values shows it, for every layout alike. Some fill up with values that are nowhere in the matrix.
    """
    key = "weight" if packed.layout == "dense" else "values"
    values = packed.tensors[key]
    count = torch.arange(1, values.numel() + 1, dtype=torch.int64, device=values.device).view(values.shape)
    numbered = dataclasses.replace(packed, dtype=torch.int64, tensors={**packed.tensors, key: count})
    number_OI = unpack(numbered).flatten()
    place = number_OI.nonzero().squeeze(1)
    out = torch.full((values.numel(),), -1, dtype=torch.int64, device=values.device)
    out[number_OI[place] - 1] = place
    return out


def grouped_linear(
    x: Tensor,
    weight_EOI: Tensor,
    offsets_E1: Tensor,
    bias_EO: Tensor | None = None,
    gather_A: Tensor | None = None,
    scatter_A: Tensor | None = None,
    scale_A: Tensor | None = None,
    rows: int = 0,
) -> Tensor:
    """A linear map of its own for each expert's assignments: gather → product → scale → scatter-add.

    `z_a = x[gather_a] W_e^T + b_e` for assignment a of expert e (`offsets_E1[e] <= a < offsets_E1[e + 1]`), times
    `scale_a` if given. With `scatter_A` the result is [rows, O], row r the sum of the z_a with `scatter_a = r`
    (0 where there is none), summed in float32 where x is of half precision; without, it is z_AO. Without `gather_A`
    x is x_AI. The weight may have any strides.
    """
    assignments = gather_A.shape[0] if gather_A is not None else x.shape[0]
    half = x.dtype in (torch.bfloat16, torch.float16)
    out_dtype = torch.float32 if half and scatter_A is not None else x.dtype
    y = x.new_zeros(rows if scatter_A is not None else assignments, weight_EOI.shape[1], dtype=out_dtype)
    for expert, (start, end) in enumerate(pairwise(offsets_E1.tolist())):
        if start == end:
            continue
        part = x[start:end] if gather_A is None else x[gather_A[start:end]]
        z = F.linear(part, weight_EOI[expert], None if bias_EO is None else bias_EO[expert]).to(out_dtype)
        if scale_A is not None:
            z = z * scale_A[start:end, None].to(out_dtype)
        if scatter_A is None:
            y[start:end] = z
        else:
            y.index_add_(0, scatter_A[start:end], z)
    return y.to(x.dtype)


def grouped_outer(g: Tensor, x: Tensor, offsets_E1: Tensor, g_rows_A: Tensor | None, x_rows_A: Tensor | None) -> Tensor:
    """For each expert the sum over its assignments of `g_a x_a^T`: [E, O, I], the weight's gradient of `grouped_linear`.

    `g_a` is row `g_rows_A[a]` of g, or row a without it; `x_a` alike.
    """
    out_EOI = g.new_zeros(offsets_E1.shape[0] - 1, g.shape[1], x.shape[1])
    for expert, (start, end) in enumerate(pairwise(offsets_E1.tolist())):
        if start == end:
            continue
        g_nO = g[start:end] if g_rows_A is None else g[g_rows_A[start:end]]
        x_nI = x[start:end] if x_rows_A is None else x[x_rows_A[start:end]]
        torch.mm(g_nO.t(), x_nI, out=out_EOI[expert])
    return out_EOI


def expert_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    offsets_E1: Tensor,
    token_A: Tensor | None = None,
    scale_A: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    form: tuple[str, str, float, float] = ("silu", "halves", 0.0, 0.0),
) -> Tensor:
    """`Σ_a scale_a (act(x W_up^T + b) W_down^T + b')` over each token's assignments; one by one without `token_A`."""
    hidden = activation.activate(grouped_linear(x, up, offsets_E1, up_bias, token_A), *form)
    return grouped_linear(hidden, down, offsets_E1, down_bias, None, token_A, scale_A, x.shape[0])
