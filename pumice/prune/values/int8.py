"""Eight bits."""

from typing import Annotated

from pumice.core.registry import values
from pumice.weights.grid import Coding


@values("int8", paper="arXiv:1712.05877")
def int8(*, search: Annotated[int, "clipping ranges tried for each row; 0 takes the full range"] = 0) -> Coding:
    """Integers of 8 bits with one scale a row; the zeros may lie in any pattern."""
    return Coding("int8", 8, search=search)
