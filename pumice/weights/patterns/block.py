"""Whole rectangles kept or dropped."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import pattern
from pumice.weights.patterns.base import Pattern


def all_or_none(mask_OI: Tensor, r: int, c: int) -> bool:
    """Whether every r x c block of a mask is kept whole or dropped whole."""
    o, i = mask_OI.shape
    if o % r or i % c:
        return False
    kept = mask_OI.view(o // r, r, i // c, c).sum(dim=(1, 3))
    return bool(((kept == 0) | (kept == r * c)).all())


@pattern("block", grammar="RxC[:row] (16x32, block:16x32)")
@dataclass(frozen=True, kw_only=True)
class Block(Pattern):
    """Blocks of R outputs by C inputs are kept or dropped whole by their summed score.

    Scope row lets each row of blocks keep the same number, layer (also for global) lets them all compete.
    """

    examples: ClassVar = ("16x32", "4x8", "1x4", "4x4:row")
    r: int
    c: int
    scope: str = "layer"

    @classmethod
    def from_text(cls, text: str, default_scope: str) -> Pattern | None:
        match = re.fullmatch(r"(?:block:)?(\d+)x(\d+)(?::(row|layer|global))?", text)
        if not match:
            return None
        r, c = int(match[1]), int(match[2])
        if r < 1 or c < 1:
            raise PumiceError(f"pattern={text!r} must have blocks of at least 1x1, as 16x32 is.")
        return cls(r=r, c=c, scope=match[3] or default_scope)

    @property
    def text(self) -> str:
        return f"{self.r}x{self.c}" + (f":{self.scope}" if self.scope != "layer" else "")

    @property
    def group_columns(self) -> int | None:  # type: ignore[override]
        return self.c

    def misfit(self, o: int, i: int) -> str | None:
        if o % self.r:
            return f"{self.r} does not divide the height {o}"
        return f"{self.c} does not divide the width {i}" if i % self.c else None

    def select(self, scores_OI: Tensor, density: float) -> Tensor:
        return select.blocks(scores_OI, self.r, self.c, density, per_row=self.scope == "row")

    def verify(self, mask_OI: Tensor) -> bool:
        return all_or_none(mask_OI, self.r, self.c)

    def storage(self, o: int, i: int) -> tuple[str, dict[str, int]] | None:
        return "block", {"r": self.r, "c": self.c}
