"""What the workers of benchmarks/peers.py share, whichever interpreter runs them: nothing but the standard library is imported first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

COLD_BYTES = 256 << 20
"""Copies of a two-layer network are rotated through so much memory, which is far more than a cache holds."""
COLD_BYTES_INT4 = 640 << 20
PROMPT = 64

Options = dict[str, Any]
Run = Callable[[int], float]
"""Calls -> seconds of one."""


class Missing(Exception):
    """Why a peer cannot run here."""


def timed(calls: Sequence[Callable[[], Any]]) -> Run:
    """The calls in turns; each has been made once before, since some prepare their weights when they are first called."""
    for call in calls:
        call()
    state = {"next": 0}

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            state["next"] = (state["next"] + 1) % len(calls)
            calls[state["next"]]()
        return (time.perf_counter() - start) / count

    return run


def copies(nbytes: float, cold: int = COLD_BYTES) -> int:
    """How many copies of so many bytes make a rotation."""
    return max(2, -int(-cold // nbytes))


def fastest(tried: dict[str, Callable[[], Any]]) -> str:
    """Whichever takes least time in a short trial."""
    seconds = {}
    for name, call in tried.items():
        run = timed([call])
        seconds[name] = min(run(1) for _ in range(5))
    return min(seconds, key=lambda name: seconds[name])


def weights_of(options: Options) -> tuple[Any, Any]:
    """Weights [2, O, I] and inputs [R, I], float32 numbers that bfloat16 holds too."""
    import numpy as np

    return np.load(options["weights"]), np.load(options["inputs"])


def torch_for(options: Options) -> Any:
    import torch

    torch.set_num_threads(options["threads"])
    torch.set_grad_enabled(False)
    return torch


def leave(y: Any, options: Options) -> None:
    """Leave the outputs where they are compared with the right ones."""
    import numpy as np

    np.save(options["outputs"], np.asarray(y, dtype=np.float32))


def openvino_options(options: Options) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": options["threads"],
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
    }
