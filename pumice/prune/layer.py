"""What a recovery is given besides the weight and its statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pumice.weights.grid import Coding, Grid
from pumice.weights.patterns.base import Pattern

Score = Callable[[Tensor], Tensor]
"""w_OI -> scores_OI, with the layer's statistics and the method's options already bound."""


@dataclass
class Selector:
    """Legal masks of one layer at its density."""

    pattern: Pattern
    density: float
    notes: list[str] = field(default_factory=list)
    coding: Coding | None = None
    """What the kept weights are to be rounded to; a recovery that `rounds` does it as it goes."""
    grids: list[Grid] = field(default_factory=list)
    """The grids of what was rounded, one for each group of a convolution."""

    @property
    def group_columns(self) -> int | None:
        """How many neighbouring columns are decided together; None if the whole matrix must be seen at once."""
        return self.pattern.group_columns

    def whole(self, scores_OI: Tensor) -> Tensor:
        """Mask of the layer, or of any whole number of its column groups."""
        return self.pattern.select(scores_OI, self.density)

    def columns(self, scores_OC: Tensor, stop: int, kept: float) -> Tensor:
        """Mask of the columns that end before column `stop`, so that the density is right up to there.

        Args:
            kept: how many columns' worth of weights is kept to the left of them.
        """
        density = (self.density * stop - kept) / scores_OC.shape[1]
        if density < 1e-9:
            return torch.zeros_like(scores_OC, dtype=torch.bool)
        return self.pattern.select(scores_OC, min(density, 1.0))

    def note(self, text: str) -> None:
        """Something the user should know of this layer; it ends up in the result."""
        self.notes.append(text)


@dataclass
class Given(Selector):
    """A mask that is decided already."""

    mask: Tensor = field(default_factory=lambda: torch.empty(0))

    def whole(self, scores_OI: Tensor) -> Tensor:
        del scores_OI
        return self.mask
