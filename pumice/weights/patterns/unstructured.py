"""Zeros anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import pattern
from pumice.weights.patterns.base import SCOPES, Pattern


@pattern("unstructured", grammar="unstructured[:row|layer|global]")
@dataclass(frozen=True, kw_only=True)
class Unstructured(Pattern):
    """Zeros anywhere; the scope says whether a weight competes within its row, its layer or the whole model.

    Within one matrix global selects like layer: an allocation has already spread the density over the layers.
    """

    examples: ClassVar = ("unstructured:row", "unstructured:layer", "unstructured:global")
    scope: str = "layer"

    @classmethod
    def from_text(cls, text: str, default_scope: str) -> Pattern | None:
        head, _, scope = text.partition(":")
        if head != "unstructured":
            return None
        if scope and scope not in SCOPES:
            raise PumiceError(f"pattern={text!r}: scope {scope!r} is not one of {', '.join(SCOPES)}.")
        return cls(scope=scope or default_scope)

    @property
    def text(self) -> str:
        return f"unstructured:{self.scope}"

    def select(self, scores_OI: Tensor, density: float) -> Tensor:
        return (select.rows if self.scope == "row" else select.layer)(scores_OI, density)

    def verify(self, mask_OI: Tensor) -> bool:
        return mask_OI.dtype == torch.bool
