"""How a matrix runs that is planned for the C++ kernels: streamed, or expanded piece by piece for a dense product.

Legend: R rows of x, O outputs, I inputs, P rows of a panel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.core.dispatch import Run
from pumice.core.errors import PumiceError

PANEL_BYTES = 4 << 20


class Planned(Protocol):
    """A stored matrix that is ready to run: the kernels' handle, which points into what the plan keeps."""

    shape: tuple[int, int]
    dtype: torch.dtype
    handle: Any


def _misfit(x_RI: Tensor, plan: Planned) -> PumiceError:
    return PumiceError(
        f"x is {tuple(x_RI.shape)} {x_RI.dtype} on {x_RI.device}: this layer takes [rows, {plan.shape[1]}] {plan.dtype} on cpu."
    )


def streamed(plan: Planned, product: Callable[..., None], *more: int) -> Run:
    """`run(x_RI) -> y_RO` by the kernel `product(handle, x, rows, y, *more, threads)`, with contiguous x and y."""
    handle, dtype = plan.handle, plan.dtype
    (outputs, inputs), keep = plan.shape, plan
    empty: Callable[..., Tensor] = torch.empty
    threads = torch.get_num_threads

    def run(x_RI: Tensor) -> Tensor:
        rows, width = x_RI.shape
        if width != inputs or x_RI.dtype is not dtype or not x_RI.is_cpu:
            raise _misfit(x_RI, keep)
        if not x_RI.is_contiguous():
            x_RI = x_RI.contiguous()
        y_RO = empty((rows, outputs), dtype=dtype)
        product(handle, x_RI.data_ptr(), rows, y_RO.data_ptr(), *more, threads())
        return y_RO

    return run


_local = threading.local()


def _buffer(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """The calling thread's panel [rows, width], reused by all layers."""
    buffers: dict[torch.dtype, Tensor] = _local.__dict__.setdefault("buffers", {})
    if dtype not in buffers or buffers[dtype].numel() < rows * width:
        with torch.inference_mode(False):
            buffers[dtype] = torch.empty(rows * width, dtype=dtype)
    return buffers[dtype][: rows * width].view(rows, width)


def panel(plan: Planned, bias: Tensor | None, expand: Callable[..., None], granule: int = 1) -> Run:
    """`run(x_RI) -> y_RO` that expands some output rows at a time, a multiple of `granule`, and multiplies them densely.

    The kernel `expand(handle, begin, end, out, threads)` writes rows of the matrix to `out`.
    """
    handle, dtype, keep = plan.handle, plan.dtype, plan
    outputs, inputs = plan.shape
    height = max(PANEL_BYTES // max(inputs * dtype.itemsize, 1), 64)
    height = min(-(-height // granule) * granule, outputs)
    bias_O = None if bias is None else bias.detach().to(dtype)
    slices = [(a, min(a + height, outputs)) for a in range(0, outputs, height)] if height else []

    def run(x_RI: Tensor) -> Tensor:
        if x_RI.shape[1] != inputs or x_RI.dtype is not dtype or not x_RI.is_cpu:
            raise _misfit(x_RI, keep)
        threads, w_PI = torch.get_num_threads(), _buffer(height, inputs, dtype)
        address = w_PI.data_ptr()
        if len(slices) == 1:
            expand(handle, 0, outputs, address, threads)
            return F.linear(x_RI, w_PI, bias_O)
        y_RO = torch.empty((x_RI.shape[0], outputs), dtype=dtype)
        for begin, end in slices:
            expand(handle, begin, end, address, threads)
            part_O = None if bias_O is None else bias_O[begin:end]
            y_RO[:, begin:end] = F.linear(x_RI, w_PI[: end - begin], part_O)
        return y_RO

    return run
