"""Patterns say which zeros are legal; each projects scores onto a legal mask and checks a mask.

Shapes: O outputs, I inputs. Masks are bool, True = kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from pumice.core import registry, select
from pumice.core.errors import PumiceError

SCOPES = ("row", "layer", "global")


class Pattern(ABC):
    """One legal structure of zeros, made from its text by `parse`.

    Subclasses are frozen dataclasses whose keyword-only fields are the options, one file each, registered with
    `@pattern(name, grammar=...)`.
    """

    examples: ClassVar[tuple[str, ...]]
    """Texts of this family; the conformance suite runs over them."""
    scope: str = "layer"
    """Who competes: the weights of a row, of a layer, or of all layers (the caller then sets each layer's density)."""
    group_columns: ClassVar[int | None] | property = 1
    """How many neighbouring columns are decided together; None where the whole matrix has to be seen."""

    decides_locally: ClassVar[bool] = False
    """Whether a column group is decided by its own scores alone, so that a column-by-column solver may decide late."""

    @classmethod
    @abstractmethod
    def from_text(cls, text: str, default_scope: str) -> Pattern | None:
        """The pattern that `text` means, or None where the text belongs to another family."""

    @property
    @abstractmethod
    def text(self) -> str:
        """What `parse` reads back."""

    @abstractmethod
    def select(self, scores_OI: Tensor, density: float) -> Tensor:
        """Mask [O, I] that keeps the best-scored share `density` in this pattern."""

    @abstractmethod
    def verify(self, mask_OI: Tensor) -> bool:
        """Whether a mask obeys the pattern (fewer kept than allowed is legal)."""

    def density(self, density: float | None) -> float:
        """The density to prune to.

        Raises:
            PumiceError: none is given, or one outside (0, 1].
        """
        if density is None:
            raise PumiceError(f"pattern={self.text!r} needs a density: give density=0.5 to keep half of the weights.")
        return select.check_density(density)

    def fit(self, kernel: int) -> Pattern:
        """The pattern for a layer whose input channels are `kernel` columns each (9 for a 3 x 3 convolution)."""
        return self

    def check_shape(self, name: str, o: int, i: int, density: float | None = None) -> None:
        """PumiceError naming the layer and the remedy if the pattern cannot be laid over a matrix [o, i]."""
        self.density(density)
        reason = self.misfit(o, i)
        if reason is not None:
            raise PumiceError(
                f"pattern={self.text!r} does not fit layer {name} of shape {o} x {i}: {reason}; leave it dense with "
                f"ignore={name!r} or use another pattern."
            )

    def misfit(self, o: int, i: int) -> str | None:
        """Why the pattern cannot be laid over a matrix [o, i], or None."""
        return None

    def storage(self, o: int, i: int) -> tuple[str, dict[str, int]] | None:
        """Layout and parameters made for this pattern, worth trying beside the general ones."""
        return None

    def __str__(self) -> str:
        return self.text


def parse(text: str | Pattern, default_scope: str = "layer") -> Pattern:
    """`"2:4"`, `"unstructured:row"`, `"16x32"`, `"row"`, `"column"` as a pattern.

    Args:
        text: the pattern as users write it; a `Pattern` comes back as it is.
        default_scope: row, layer or global, for patterns whose text leaves the scope open.

    Raises:
        PumiceError: no registered pattern reads the text; the message lists what there is.
    """
    if isinstance(text, Pattern):
        return text
    if default_scope not in SCOPES:
        raise PumiceError(f"scope={default_scope!r} is not one of {', '.join(SCOPES)}.")
    for info in registry.pattern.members():
        found = info.obj.from_text(str(text).strip().lower(), default_scope)
        if found is not None:
            return found
    known = ", ".join(info.extras["grammar"] for info in registry.pattern.members())
    raise PumiceError(f"pattern={text!r} is none of the known ones; write one of: {known}.")
