"""DSnoT on a model that is pruned already."""

from __future__ import annotations

from typing import Annotated, Any

from torch import nn

from pumice.core.registry import repair
from pumice.prune.repair.again import pattern_of, solve_again
from pumice.prune.repair.base import Job


@repair("dsnot", key="dsnot", paper="arXiv:2310.08915")
def dsnot(
    model: nn.Module,
    job: Job,
    *,
    cycles: Annotated[int, "most swaps per row"] = 50,
    threshold: Annotated[float, "stop when the expected error of a row, per token, is smaller than this"] = 0.1,
    power: Annotated[float, "power of the input variance that a regrown weight is divided by"] = 1.0,
) -> dict[str, Any]:
    """Swap weights in and out of the mask row by row until the expected output error is small (DSnoT); no training.

    The recovery of that name, on a mask from elsewhere: kept weights get the dense model's values, so that what a
    recovery or repair before it compensated is lost. N:M masks stay N:M.
    """
    recover = {"name": "dsnot", "cycles": cycles, "threshold": threshold, "power": power}
    return solve_again(model, job, "dsnot", score="magnitude", recover=recover, pattern=pattern_of(job))
