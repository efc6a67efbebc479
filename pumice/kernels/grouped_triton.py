"""Triton backends of the grouped products, for GPUs: gather on load, sum on store, no padding.

They are tested in Triton's interpreter and have not been timed: PyTorch's grouped_mm comes first where it runs.
Legend: O outputs, I inputs, E experts.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pumice.core.dispatch import Backend, Call, Run, limits, register

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, to test them (environment variable TRITON_INTERPRET)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _refuse(call: Call) -> str | None:
    if torch.device(call.device).type != "cuda" and not interpreting():
        return f"Triton kernels need a CUDA device, not {call.device}"
    if not _installed():
        return "triton is not installed (pip install 'pumice[triton]')"
    return limits(call, dtypes=DTYPES)


def _prepare_linear(weight_EOI: Any, bias_EO: Tensor | None) -> Run:
    from pumice.kernels.triton import grouped

    def run(x: Tensor, offsets_E1: Tensor, *more: Any) -> Tensor:
        return grouped.linear(x, weight_EOI, offsets_E1, bias_EO, *more)

    return run


def _prepare_outer(_: Any, __: Tensor | None) -> Run:
    from pumice.kernels.triton import grouped

    return grouped.outer


SUMMARY = "Triton: gathered on load, summed on store"
register(Backend("triton", "grouped_linear", "dense", _refuse, _prepare_linear, 5, SUMMARY))
register(Backend("triton", "grouped_outer", "dense", _refuse, _prepare_outer, 5, SUMMARY))
