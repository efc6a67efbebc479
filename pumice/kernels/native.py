"""Backends that PyTorch brings along: dense by F.linear and by oneDNN, CSR by MKL, and unpacking at every call.

Legend: R rows of x, O outputs, I inputs.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.core import registry
from pumice.core.dispatch import Backend, Call, Run, limits, register

if TYPE_CHECKING:
    from pumice.weights.layouts.base import Packed


def _bias(packed: Packed, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(packed.dtype)


def _anything(call: Call) -> str | None:
    return None


def _prepare_dense(packed: Packed, bias: Tensor | None) -> Run:
    weight_OI, bias_O = packed.tensors["weight"].detach(), _bias(packed, bias)
    linear = F.linear

    def run(x_RI: Tensor) -> Tensor:
        return linear(x_RI, weight_OI, bias_O)

    return run


def _prepare_unpack(packed: Packed, bias: Tensor | None) -> Run:
    restore, bias_O = registry.layout.get(packed.layout).obj.unpack, _bias(packed, bias)

    def run(x_RI: Tensor) -> Tensor:
        return F.linear(x_RI, restore(packed), bias_O)

    return run


@cache
def onednn_missing(dtype: torch.dtype) -> str | None:
    """Why oneDNN cannot run prepacked weights of this dtype here, or None; found out by trying it once."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch is built without oneDNN"
    try:
        run = _onednn(torch.ones(16, 16, dtype=dtype), None)
        y = run(torch.ones(1, 16, dtype=dtype))
    except (RuntimeError, AttributeError) as error:
        return f"oneDNN cannot prepack {str(dtype).removeprefix('torch.')} here ({str(error).splitlines()[0]})"
    return None if bool((y == 16).all()) else "oneDNN gave a wrong product in a trial"


def _onednn(weight_OI: Tensor, bias_O: Tensor | None) -> Run:
    prepacked = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
    linear = torch.ops.mkldnn._linear_pointwise.default

    def run(x_RI: Tensor) -> Tensor:
        return linear(x_RI, prepacked, bias_O, "none", [], "")

    return run


def _refuse_onednn(call: Call) -> str | None:
    reason = limits(call, devices=("cpu",), dtypes=(torch.bfloat16, torch.float32, torch.float16))
    return reason or onednn_missing(call.dtype)


def _prepare_onednn(packed: Packed, bias: Tensor | None) -> Run:
    return _onednn(packed.tensors["weight"].detach().contiguous(), _bias(packed, bias))


def _onednn_extra(packed: Packed) -> int:
    return packed.dense_nbytes


def _refuse_csr(call: Call) -> str | None:
    reason = limits(call, devices=("cpu",), dtypes=(torch.float32,))
    if reason is None and not torch.backends.mkl.is_available():
        return "this PyTorch is built without MKL, which its CSR products need"
    return reason


def _csr_extra(packed: Packed) -> int:
    # Columns in 32 bits.
    columns = packed.tensors["columns"]
    return 0 if columns.dtype is torch.int32 else 4 * columns.numel()


def _prepare_csr(packed: Packed, bias: Tensor | None) -> Run:
    stored, bias_O = packed.tensors, _bias(packed, bias)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta.*")
        weight_OI = torch.sparse_csr_tensor(
            stored["row_starts"].to(torch.int32),
            stored["columns"].to(torch.int32),
            stored["values"].detach(),
            size=packed.shape,
            check_invariants=False,
        )

    def run(x_RI: Tensor) -> Tensor:
        y_RO = torch.mv(weight_OI, x_RI[0])[None] if x_RI.shape[0] == 1 else (weight_OI @ x_RI.t()).t().contiguous()
        return y_RO if bias_O is None else y_RO.add_(bias_O)

    return run


register(Backend("torch", "linear", "dense", _anything, _prepare_dense, 10, "F.linear on the dense weight"))
register(
    Backend(
        "onednn",
        "linear",
        "dense",
        _refuse_onednn,
        _prepare_onednn,
        5,
        "oneDNN, weight copied in its blocked order",
        _onednn_extra,
    )
)
register(Backend("mkl", "linear", "csr", _refuse_csr, _prepare_csr, 20, "MKL's sparse CSR product", _csr_extra))
for _info in registry.layout.members():
    if _info.name == "dense":
        continue
    register(
        Backend(
            "unpack",
            "linear",
            _info.name,
            _anything,
            _prepare_unpack,
            0,
            "unpacks to dense at every call, then F.linear",
        )
    )
