"""Whole inputs kept or dropped."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import pattern
from pumice.weights.patterns.base import Pattern
from pumice.weights.patterns.block import all_or_none


@pattern("column", grammar="column[:WIDTH] | channel")
@dataclass(frozen=True, kw_only=True)
class Column(Pattern):
    """Whole inputs of the layer are kept or dropped by their summed score, `width` neighbouring columns at a time.

    "channel" takes its width from the layer (`fit`): an input channel of a k x k convolution is k^2 neighbouring
    columns, that of a linear layer is one.
    """

    examples: ClassVar = ("column", "column:4", "channel")
    width: int = 1
    channel: bool = False
    group_columns = None

    @classmethod
    def from_text(cls, text: str, default_scope: str) -> Pattern | None:
        if text == "channel":
            return cls(channel=True)
        match = re.fullmatch(r"column(?::(\d+))?", text)
        if not match:
            return None
        if match[1] is not None and int(match[1]) < 1:
            raise PumiceError(f"pattern={text!r} must take at least 1 column at a time.")
        return cls(width=int(match[1] or 1))

    @property
    def text(self) -> str:
        return "channel" if self.channel else "column" if self.width == 1 else f"column:{self.width}"

    def fit(self, kernel: int) -> Pattern:
        return replace(self, width=kernel) if self.channel else self

    def misfit(self, o: int, i: int) -> str | None:
        return f"{self.width} does not divide the width {i}" if i % self.width else None

    def select(self, scores_OI: Tensor, density: float) -> Tensor:
        return select.blocks(scores_OI, max(scores_OI.shape[0], 1), self.width, density)

    def verify(self, mask_OI: Tensor) -> bool:
        return all_or_none(mask_OI, max(mask_OI.shape[0], 1), self.width)

    def storage(self, o: int, i: int) -> tuple[str, dict[str, int]] | None:
        return "block", {"r": o, "c": self.width}
