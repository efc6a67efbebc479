"""What a recovery is given besides the weight and its statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from pumice.weights.patterns.base import Pattern

Score = Callable[[Tensor], Tensor]
"""w_OI -> scores_OI, with the layer's statistics and the method's options already bound."""


@dataclass
class Selector:
    """Legal masks of one layer at its density."""

    pattern: Pattern
    density: float
    notes: list[str] = field(default_factory=list)

    @property
    def group_columns(self) -> int | None:
        """How many neighbouring columns are decided together; None if the whole matrix must be seen at once."""
        return self.pattern.group_columns

    def whole(self, scores_OI: Tensor) -> Tensor:
        """Mask of the layer, or of any whole number of its column groups."""
        return self.pattern.select(scores_OI, self.density)

    def note(self, text: str) -> None:
        """Something the user should know of this layer; it ends up in the result."""
        self.notes.append(text)
