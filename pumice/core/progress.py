"""One way to show progress: a tqdm bar with ETA on stderr."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def bar(total: int, description: str, *, enabled: bool = True, unit: str = "it") -> tqdm[Any]:
    """A progress bar that shows itself only where a person can watch it."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        disable=not (enabled and sys.stderr.isatty()),
        dynamic_ncols=True,
        leave=False,
    )
