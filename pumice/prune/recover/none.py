"""No recovery."""

from torch import Tensor

from pumice.core.registry import recovery
from pumice.core.stats import Stats
from pumice.prune.layer import Score, Selector


@recovery("none")
def none(w_OI: Tensor, stats: Stats, score: Score, select: Selector) -> tuple[Tensor, Tensor]:
    """Zero what was not selected and leave the rest as it is."""
    del stats
    mask = select.whole(score(w_OI))
    return w_OI * mask, mask
