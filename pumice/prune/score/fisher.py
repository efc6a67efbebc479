"""Diagonal Fisher score."""

from torch import Tensor

from pumice.core.registry import scorer
from pumice.core.stats import Stats


@scorer("fisher", paper="LeCun et al. 1989 (OBD); arXiv:1801.05787", needs=("fisher_diag",))
def fisher(w_OI: Tensor, stats: Stats) -> Tensor:
    """w²·F/2: the loss increase of Optimal Brain Damage with the empirical Fisher diagonal as curvature."""
    return w_OI.square() * stats["fisher_diag"] / 2
