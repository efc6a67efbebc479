"""Weights as they are."""

from pumice.core.registry import values
from pumice.weights.grid import Coding


@values("none")
def none() -> Coding | None:
    """Keep the weights in floating point."""
    return None
