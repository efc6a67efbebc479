"""Four bits in groups."""

from typing import Annotated

from pumice.core.registry import values
from pumice.weights.grid import Coding


@values("int4", paper="arXiv:2210.17323")
def int4(
    *,
    group: Annotated[int, "neighbouring inputs that share a scale, a multiple of 16"] = 16,
    zero: Annotated[bool, "a zero point for each group beside its scale"] = False,
    search: Annotated[int, "clipping ranges tried for each group; 0 takes the full range"] = 8,
) -> Coding:
    """Integers of 4 bits with one scale for each group of inputs; groups that are all zero need not be stored."""
    return Coding("int4", 4, group, zero, search)
