"""What `pack` measured, kept on disk, so that a model of known shapes is packed at once the next time.

A verdict holds for one machine, thread count, set of versions and kernels, shape, type, density and batch; whatever of
these changes is measured again. The files lie in `$PUMICE_CACHE`, else in the user's cache folder, and may be deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from pumice.engine.layer_timing import Timing, Verdict, measure
from pumice.kernels.features import machine_stamp, native_build
from pumice.weights.layouts.base import Packed

FORMAT = 5


def cache_folder() -> Path:
    """Where verdicts are kept."""
    given = os.environ.get("PUMICE_CACHE")
    if given:
        return Path(given).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "pumice"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pumice"


def _circumstances() -> dict[str, Any]:
    """Everything but the layer that decides how fast something runs here."""
    return {**{key: value for key, value in machine_stamp().items() if key != "date"}, "build": native_build()}


def _file(signature: Any) -> Path:
    asked = json.dumps([FORMAT, _circumstances(), repr(signature)], sort_keys=True)
    return cache_folder() / "pack" / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"


def recall(signature: Any) -> Verdict | None:
    """The verdict measured earlier in the same circumstances, or None."""
    try:
        stored = json.loads(_file(signature).read_text())
        return Verdict(
            stored["layout"],
            stored["params"],
            {int(rows): name for rows, name in stored["backends"].items()},
            [Timing(**timing) for timing in stored["timings"]],
            {int(rows): Timing(**timing) for rows, timing in stored["best_dense"].items()},
            stored["reason"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        # Absent, or left half written by something else: it is measured again and replaced.
        return None


def remember(signature: Any, verdict: Verdict) -> None:
    """Keep a verdict; where the folder cannot be written, nothing is kept and nothing fails."""
    file = _file(signature)
    partial = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(asdict(verdict)))
        partial.replace(file)
    except OSError:
        with suppress(OSError):
            partial.unlink()


def kind_of(packed: Packed) -> Any:
    """The same for layers that may share one measurement."""
    params = tuple(sorted(packed.params.items()))
    return packed.shape, packed.dtype, packed.layout, params, round(packed.nonzero_share * 40)


class Asked(NamedTuple):
    """What a layer is timed for."""

    rows: Sequence[int]
    budget: int
    """Bytes that copies of the layer are rotated through, so that its weights come from memory."""
    remeasure: bool = False
    activations: str | None = None


def verdict_of(packed: Packed, asked: Asked, attempt: int = 0) -> Verdict:
    """How one layer runs fastest here, measured, or recalled from an earlier measurement in the same circumstances.

    `attempt` counts the verdicts on such layers that this one could not follow.
    """
    more = [asked.activations] if asked.activations else []
    key = (*kind_of(packed), tuple(asked.rows), asked.budget, *more, *([attempt] if attempt else []))
    found = None if asked.remeasure else recall(key)
    if found is None:
        found = measure(packed, asked.rows, asked.budget, asked.activations)
        remember(key, found)
    return found
