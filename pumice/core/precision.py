"""How the forward passes of a calibration compute: in float32, or with bf16 products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pumice.core import dispatch


class _Attention(TorchFunctionMode):
    """Plain softmax attention through dispatch, which knows a faster kernel for some CPUs than PyTorch has."""

    def __torch_function__(self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) >= 3:
            q, k, v = args[:3]
            if kwargs.get("enable_gqa") and k.dim() == 4 and k.shape[1] and q.shape[1] % k.shape[1] == 0:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            run = self._kernel((q, k, v, *args[3:]), kwargs)
            if run is not None:
                return run(q, k, v)
        return func(*args, **kwargs)

    @staticmethod
    def _kernel(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[..., Tensor] | None:
        """What runs this call, or None to leave it to PyTorch (masks, dropout, other lengths)."""
        q, k, v = args[:3]
        given = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), args[3:], strict=False)), **kwargs}
        plain = given.get("attn_mask") is None and not given.get("dropout_p") and q.dim() == 4
        if not plain or q.shape != k.shape or q.shape != v.shape:
            return None
        shape = (q.shape[2], q.shape[3])
        call = dispatch.Call("attention", "dense", torch.bfloat16, q.device.type, q.shape[2], shape)
        backend = dispatch.choose(call)
        if backend.name == "torch":
            return None
        return backend.prepare((given.get("scale"), bool(given.get("is_causal"))), None)


@contextmanager
def products(device: str, compute: torch.dtype) -> Iterator[None]:
    """Forward passes whose matrix products read `compute`: float32 as the model is, bfloat16 by autocast.

    For one stretch of forward passes only: autocast keeps weights in bf16, which must not outlive a change of them.
    """
    if compute != torch.bfloat16:
        yield
        return
    with torch.autocast(device, torch.bfloat16), _Attention():
        yield
