"""What a structured method is given besides the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Job:
    """One request to make a model smaller by removing whole channels, heads, blocks or directions.

    Args:
        density: share of the parameters inside the blocks to keep, in (0, 1].
        batches: calibration batches as the model takes them; empty where nobody gave data.
        compute: dtype of the matrix products of forward passes that only measure.
        notes: what the user should know of the result; methods append to it.
    """

    density: float
    batches: list[Any] = field(default_factory=list)
    progress: bool = True
    notes: list[str] = field(default_factory=list)
    compute: torch.dtype = torch.float32
