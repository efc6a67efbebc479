"""Huge pages for weights: a kernel that streams a matrix waits less for addresses to be translated. And freed ones given back.

Where the operating system can (Linux from 6.1 on), the memory that tensors lie in already is gathered into pages of 2 MiB in
place. Nothing of the tensors changes, and where it cannot be done nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice.weights.sparse_module import SparseModule

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MADV_COLLAPSE = 25
NEIGHBOURS = 64 << 10
"""Tensors that lie closer to each other than this share their huge pages."""


def page_size() -> int | None:
    """Bytes of a huge page, or None where there are none or the administrator does not want them."""
    if sys.platform != "linux":
        return None
    try:
        if "[never]" in (SETTINGS / "enabled").read_text():
            return None
        return int((SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return None


def ranges(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Begin and end of the memory of tensors on the CPU, those of neighbours as one, ascending."""
    found: list[tuple[int, int]] = []
    places = sorted(
        {
            (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())
            for t in tensors
            if t.is_cpu and t.layout is torch.strided
        }
    )
    for begin, end in places:
        if begin == end:
            continue
        if found and begin - found[-1][1] <= NEIGHBOURS:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def gather(tensors: Iterable[Tensor]) -> int:
    """Bring the memory of tensors into huge pages where that is possible; bytes of those that now are."""
    size = page_size()
    if size is None:
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # A page at an edge belongs to others too, who lose nothing; one that is not all there is refused by the system. What is
    # much smaller than a page is not worth one.
    wanted = [(begin, end) for begin, end in ranges(tensors) if 2 * (end - begin) >= size]
    pages = {page for begin, end in wanted for page in range(begin // size * size, end, size)}
    return size * sum(madvise(page, size, MADV_COLLAPSE) == 0 for page in sorted(pages))


def give_back() -> None:
    """Return freed memory to the system where the C library can: what was timed leaves up to several times a model behind."""
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def gather_weights(model: nn.Module) -> int:
    """The same for everything that a model stores; not for what kernels make of it when they are bound."""
    parameters = [parameter.detach() for parameter in model.parameters()]
    buffers = [buffer for module in model.modules() if isinstance(module, SparseModule) for buffer in module.buffers()]
    return gather([*parameters, *buffers])
