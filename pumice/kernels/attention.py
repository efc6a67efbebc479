"""Dense attention while calibrating: the op "attention", whose state is the scale and whether it is causal.

Legend: B batch, H heads, T tokens, D features of a head. `prepare((scale, causal), None)` returns
`run(q_BHTD, k_BHTD, v_BHTD) -> out_BHTD`. A call of dtype bfloat16 reads and returns bf16, with scores and sums in
float32; its shape is (T, D).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.core.dispatch import Backend, Call, Run, register
from pumice.kernels.cpu_backend import missing, native

BLOCK = 64
LONGEST = 8192
"""Scores of 64 queries and all keys lie in the cache; beyond this PyTorch's tiled attention is the better choice."""


def _prepare_torch(settings: Any, _: Tensor | None) -> Run:
    scale, causal = settings

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)

    return run


def _refuse_native(call: Call) -> str | None:
    tokens, features = call.shape
    if call.dtype != torch.bfloat16 or call.device != "cpu":
        return f"multiplies bfloat16 on cpu, not {call.dtype} on {call.device}"
    if native is None:
        return missing()
    if "avx512_bf16" not in native.features():
        return "needs AVX-512 BF16, which this CPU has not"
    if features % 2:
        return f"{features} features of a head are odd"
    return f"{tokens} tokens are more than {LONGEST}" if tokens > LONGEST else None


def _prepare_native(settings: Any, _: Tensor | None) -> Run:
    scale, causal = settings

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.to(torch.bfloat16).contiguous() for x in (q, k, v))
        batch, heads, tokens, features = q.shape
        out = torch.empty_like(q)
        keys = -(-tokens // BLOCK) * BLOCK * features // 2
        values = -(-features // BLOCK) * BLOCK * -(-tokens // 2)
        packed = torch.empty(batch * heads * (keys + values), dtype=torch.int32)
        factor = features**-0.5 if scale is None else scale
        pointers = (x.data_ptr() for x in (q, k, v, out, packed))
        native.attention(*pointers, batch * heads, tokens, features, round(factor * 1e6), int(causal))
        return out

    return run


register(Backend("torch", "attention", "dense", lambda call: None, _prepare_torch, 10, "PyTorch"))
register(
    Backend("avx512_bf16", "attention", "dense", _refuse_native, _prepare_native, 20, "C++: bf16, sums in float32")
)
