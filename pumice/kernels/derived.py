"""Tensors that a kernel makes from stored ones, kept as long as those live and are unchanged.

A layer's backends, and the operators of a graph at every call, so share one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")
_kept = WeakTensorKeyDictionary()


def _state(tensor: Tensor) -> Any:
    # Not the address alone: other numbers may come to stand where these were. Inference tensors count no versions.
    memory = StorageWeakRef(tensor.untyped_storage())
    return memory, tensor.data_ptr(), tensor.dtype, 0 if tensor.is_inference() else tensor._version


def derived(sources: Sequence[Tensor], make: Callable[[], Made]) -> Made:
    """What `make()` gives for these tensors: made once, and again when one of them was replaced or changed in place.

    It lives no longer than the first of them, and only one thing is kept for each first tensor. Changes that PyTorch does
    not count (through `.data`) are not seen.
    """
    state = [_state(tensor) for tensor in sources]
    found = _kept.get(sources[0])
    if found is None or found[0] != state:
        found = _kept[sources[0]] = (state, make())
    return found[1]
