"""Dense convolutions for the op `conv2d`: PyTorch's, and oneDNN with the weight in its own order.

They are what sparse ones are measured against, and what runs where dense is faster.
Legend: N images, C channels, H rows, W columns, O outputs, I inputs of an output (kernel positions included).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.core.convolution import Convolution
from pumice.core.dispatch import Backend, Call, Run, limits, register
from pumice.kernels.native import onednn_missing
from pumice.weights.layouts.base import Packed

DTYPES = (torch.bfloat16, torch.float32)
ATTRIBUTES: dict[tuple[float, float], tuple[str, list[float]]] = {
    (-math.inf, math.inf): ("none", []),
    (0.0, math.inf): ("relu", []),
    (0.0, 6.0): ("hardtanh", [0.0, 6.0]),
}
"""oneDNN's names for what comes behind a convolution."""


def _parts(packed: Packed, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return packed.tensors["weight"].detach(), None if bias is None else bias.detach().to(packed.dtype)


def _padded(x_NCHW: Tensor, how: Convolution) -> tuple[Tensor, tuple[int, int]]:
    """x and the padding that is the same on both sides; what is not is added to x."""
    if how.before == how.after:
        return x_NCHW, how.before
    sides = (how.before[1], how.after[1], how.before[0], how.after[0])
    return F.pad(x_NCHW, sides), (0, 0)


def _finished(y_NOHW: Tensor, how: Convolution, add_NOHW: Tensor | None) -> Tensor:
    if add_NOHW is not None:
        y_NOHW = y_NOHW.add_(add_NOHW)
    if how.clamp == (0.0, math.inf):
        return y_NOHW.relu_()
    return y_NOHW if how.clamp == (-math.inf, math.inf) else y_NOHW.clamp_(*how.clamp)


def _prepare_torch(packed: Packed, bias: Tensor | None) -> Run:
    weight_OI, bias_O = _parts(packed, bias)

    def run(x_NCHW: Tensor, how: Convolution, add_NOHW: Tensor | None = None) -> Tensor:
        x_NCHW, padding = _padded(x_NCHW, how)
        weight = weight_OI.unflatten(1, (-1, *how.kernel_size))
        y_NOHW = F.conv2d(x_NCHW, weight, bias_O, how.stride, padding, how.dilation, how.groups)
        return _finished(y_NOHW, how, add_NOHW)

    return run


def _prepare_onednn(packed: Packed, bias: Tensor | None) -> Run:
    *given, bias_O = _parts(packed, bias)
    ordered: dict[Convolution, Any] = {}

    def run(x_NCHW: Tensor, how: Convolution, add_NOHW: Tensor | None = None) -> Tensor:
        x_NCHW, padding = _padded(x_NCHW, how)
        settings = (padding, how.stride, how.dilation, how.groups)
        if how not in ordered:
            # The order that is best depends on the size of x too; that of the first is kept.
            # Only the copy is kept, since nobody else may hold what was given.
            plain = given.pop() if given else next(iter(ordered.values())).to_dense().flatten(1)
            weight = plain.unflatten(1, (-1, *how.kernel_size)).contiguous()
            ordered[how] = torch.ops.mkldnn._reorder_convolution_weight(weight, *settings, list(x_NCHW.shape))
        attribute = ATTRIBUTES.get(how.clamp) if add_NOHW is None else None
        y_NOHW = torch.ops.mkldnn._convolution_pointwise.default(
            x_NCHW, ordered[how], bias_O, *settings, *(attribute or ("none", [])), ""
        )
        return y_NOHW if attribute else _finished(y_NOHW, how, add_NOHW)

    return run


@cache
def _missing(dtype: torch.dtype) -> str | None:
    """Why oneDNN cannot convolve with a weight in its own order here, or None; found out by trying it once."""
    weight_OI, x_NCHW = torch.ones(8, 72, dtype=dtype), torch.ones(1, 8, 5, 5, dtype=dtype)
    try:
        run = _prepare_onednn(Packed("dense", (8, 72), dtype, {"weight": weight_OI}, {}), None)
        y_NOHW = run(x_NCHW, Convolution((3, 3)))
    except (RuntimeError, AttributeError) as error:
        return f"this PyTorch cannot order a convolution's weight for oneDNN ({str(error).splitlines()[0]})"
    return None if bool((y_NOHW == 72).all()) else "oneDNN gave a wrong convolution in a trial"


def _refuse_onednn(call: Call) -> str | None:
    return limits(call, devices=("cpu",), dtypes=DTYPES) or onednn_missing(call.dtype) or _missing(call.dtype)


def _anything(call: Call) -> str | None:
    return None


def _extra(packed: Packed) -> int:
    return packed.nbytes


register(Backend("torch", "conv2d", "dense", _anything, _prepare_torch, 10, "F.conv2d"))
register(
    Backend("onednn", "conv2d", "dense", _refuse_onednn, _prepare_onednn, 20, "oneDNN, weight in its own order", _extra)
)
