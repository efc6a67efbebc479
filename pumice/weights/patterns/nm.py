"""At most N of every M neighbouring inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import pattern
from pumice.weights.patterns.base import Pattern


@pattern("nm", grammar="N:M (2:4, 4:8, ...)", paper="arXiv:2104.08378")
@dataclass(frozen=True, kw_only=True)
class NOfM(Pattern):
    """At most N of every M neighbouring inputs of an output are kept, so that the density is N/M everywhere."""

    examples: ClassVar = ("2:4", "4:8", "1:4", "3:6", "16:32")
    n: int
    m: int
    scope = "row"
    decides_locally = True

    @classmethod
    def from_text(cls, text: str, default_scope: str) -> Pattern | None:
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match:
            return None
        n, m = int(match[1]), int(match[2])
        if not 1 <= n <= m:
            raise PumiceError(f"pattern={text!r} must keep between 1 and M of every M weights, as 2:4 does.")
        return cls(n=n, m=m)

    @property
    def text(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def group_columns(self) -> int | None:  # type: ignore[override]
        return self.m

    def density(self, density: float | None) -> float:
        fixed = self.n / self.m
        if density is not None and abs(select.check_density(density) - fixed) > 1e-6:
            raise PumiceError(
                f"density={density} contradicts pattern={self.text!r}, which keeps {fixed:g}: leave the density out "
                f"or choose another pattern."
            )
        return fixed

    def misfit(self, o: int, i: int) -> str | None:
        return f"{self.m} does not divide the width {i}" if i % self.m else None

    def select(self, scores_OI: Tensor, density: float) -> Tensor:
        return select.n_of_m(scores_OI, self.n, self.m)

    def verify(self, mask_OI: Tensor) -> bool:
        if self.misfit(*mask_OI.shape):
            return False
        return bool((mask_OI.unflatten(-1, (mask_OI.shape[-1] // self.m, self.m)).sum(-1) <= self.n).all())

    def storage(self, o: int, i: int) -> tuple[str, dict[str, int]] | None:
        return "nm", {"n": self.n, "m": self.m}
