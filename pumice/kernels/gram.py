"""xᵀx for calibration: the op "gram", whose state is the running sum.

Legend: T tokens, I inputs. The "matrix" of a call is the sum [I, I]; `prepare(sum, None)` returns `run(x_TI) -> sum`,
which adds to the upper triangle only. A call of dtype bfloat16 allows x to be read as bf16, with sums in float32;
PyTorch's own switch for that (`fp32_precision = "bf16"`) is not heeded by every CPU (benchmarks/calibration.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.core.dispatch import Backend, Call, Run, register
from pumice.kernels.cpu_backend import missing, native

TILE = 64


def _prepare_torch(sum_II: Any, _: Tensor | None) -> Run:
    width = sum_II.shape[0]
    panel = max(384, -(-width // 4))

    def run(x_TI: Tensor) -> Tensor:
        # Panels of the upper triangle: the other half is its mirror.
        for start in range(0, width, panel):
            stop = min(start + panel, width)
            sum_II[start:stop, start:].addmm_(x_TI[:, start:stop].t(), x_TI[:, start:])
        return sum_II

    return run


def _refuse_native(call: Call) -> str | None:
    if call.dtype != torch.bfloat16 or call.device != "cpu":
        return f"multiplies bfloat16 on cpu, not {call.dtype} on {call.device}"
    if native is None:
        return missing()
    return None if "avx512_bf16" in native.features() else "needs AVX-512 BF16, which this CPU has not"


def _prepare_native(sum_II: Any, _: Tensor | None) -> Run:
    width = sum_II.shape[0]
    blocks = -(-width // TILE)
    assert sum_II.is_contiguous()
    assert sum_II.dtype == torch.float32

    def run(x_TI: Tensor) -> Tensor:
        x_TI = x_TI.to(torch.float32).contiguous()
        tokens = x_TI.shape[0]
        packed = torch.empty(blocks * TILE * -(-tokens // 2), dtype=torch.int32)
        native.gram(x_TI.data_ptr(), tokens, width, sum_II.data_ptr(), packed.data_ptr())
        return sum_II

    return run


register(Backend("torch", "gram", "dense", lambda call: None, _prepare_torch, 10, "PyTorch in float32"))
register(Backend("avx512_bf16", "gram", "dense", _refuse_native, _prepare_native, 20, "C++: upper triangle, vdpbf16ps"))
