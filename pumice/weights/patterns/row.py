"""Whole outputs kept or dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pumice.core import select
from pumice.core.registry import pattern
from pumice.weights.patterns.base import Pattern
from pumice.weights.patterns.block import all_or_none


@pattern("row", grammar="row")
@dataclass(frozen=True, kw_only=True)
class Row(Pattern):
    """Whole rows, which are outputs of the layer (neurons, filters), are kept or dropped by their summed score."""

    examples: ClassVar = ("row",)
    group_columns = None

    @classmethod
    def from_text(cls, text: str, default_scope: str) -> Pattern | None:
        return cls() if text == "row" else None

    @property
    def text(self) -> str:
        return "row"

    def select(self, scores_OI: Tensor, density: float) -> Tensor:
        return select.blocks(scores_OI, 1, max(scores_OI.shape[1], 1), density)

    def verify(self, mask_OI: Tensor) -> bool:
        return all_or_none(mask_OI, 1, max(mask_OI.shape[1], 1))

    def storage(self, o: int, i: int) -> tuple[str, dict[str, int]] | None:
        return "block", {"r": 1, "c": i}
