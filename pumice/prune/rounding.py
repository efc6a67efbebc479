"""Rounding to a grid inside a walk over columns, so that later columns make up for its error.

Shapes: O outputs, C columns of one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.weights.grid import Coding, Grid, nearest


class Rounder:
    """Gives each group its scale when the walk reaches its first column, and rounds column by column.

    The scale is fitted to the weights as they are then, with everything to the left made up for already (GPTQ); where
    the whole row shares a scale it is fitted once, to the weights before the walk.
    """

    def __init__(self, coding: Coding) -> None:
        self.coding = coding
        self.scales: list[Tensor] = []
        self.zeros: list[Tensor] = []
        self._zero: Tensor | None = None

    def begins(self, column: int) -> bool:
        """Whether a scale is due before this column."""
        return not self.scales if self.coding.group == 0 else column % self.coding.group == 0

    def begin(self, w_CO: Tensor, worth_C: Tensor) -> None:
        """Fit the next scale to columns held as rows; `worth_C` weights their squared errors."""
        scale, zero = self.coding.columns(w_CO.t(), worth_C)
        self.scales.append(scale)
        self._zero = zero
        if zero is not None:
            self.zeros.append(zero)

    def round(self, w_O: Tensor) -> Tensor:
        """One column on the grid."""
        scale = self.scales[-1]
        return nearest(w_O, scale, self._zero, self.coding.bits) * scale + 0.0

    def grid(self) -> Grid:
        zeros = torch.stack(self.zeros, 1).to(torch.uint8) if self.zeros else None
        return Grid(self.coding.bits, self.coding.group, torch.stack(self.scales, 1), zeros)
