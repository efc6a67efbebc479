"""The specification: every sparse operation in plain PyTorch. Each kernel must agree with what is here.

Legend: R rows of x, O outputs, I inputs per group.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.core import registry

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
    """Where each stored value sits: flat index into w_OI of every element of `values`, in its order, int64.

    A layout is a bijection between its stored values and places of the matrix, so unpacking 1, 2, 3, … instead of
    the values shows it, for every layout alike.
    """
    key = "weight" if packed.layout == "dense" else "values"
    values = packed.tensors[key]
    count = torch.arange(1, values.numel() + 1, dtype=torch.int64, device=values.device).view(values.shape)
    numbered = dataclasses.replace(packed, dtype=torch.int64, tensors={**packed.tensors, key: count})
    number_OI = unpack(numbered).flatten()
    place = number_OI.nonzero().squeeze(1)
    out = torch.empty(values.numel(), dtype=torch.int64, device=values.device)
    out[number_OI[place] - 1] = place
    return out
