"""Tensors whose last byte is the last one that may be read: whoever reads on dies. For scripts in processes of their own."""

import ctypes
import mmap
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch

from pumice.kernels import cpu_backend
from tests.conftest import ROOT

HEAD = """
import torch
from pumice.core import dispatch
from pumice.kernels import cpu_backend
from pumice.weights.layouts import base
from tests.guarded import at_the_end, forced
dispatch.discover()
torch.set_num_threads(1)
"""
_held: list[mmap.mmap] = []


def at_the_end(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is the last one that may be read; an empty tensor as it is."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    pages = -(-size // mmap.PAGESIZE) + 1
    area = mmap.mmap(-1, pages * mmap.PAGESIZE)
    _held.append(area)
    last = ctypes.addressof(ctypes.c_char.from_buffer(area)) + (pages - 1) * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(last), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=(pages - 1) * mmap.PAGESIZE - size)
    return copy.copy_(tensor.flatten()).view(tensor.shape)


def forced() -> Iterator[str]:
    """Every instruction set that there is, one after the other in force."""
    for isa, reason in cpu_backend.instruction_sets().items():
        if reason is None:
            cpu_backend.force(isa)
            yield isa


def check_guarded(body: str) -> None:
    """Run a script behind HEAD, which must get to its end."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs mprotect as Linux has it")
    script = f"{HEAD}{textwrap.dedent(body)}\nprint('read nothing beyond')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "read nothing beyond" in done.stdout, f"exit {done.returncode}: {done.stderr[-2000:]}"
