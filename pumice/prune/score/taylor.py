"""First-order Taylor score."""

from torch import Tensor

from pumice.core.registry import scorer
from pumice.core.stats import Stats


@scorer("taylor", paper="arXiv:1611.06440; arXiv:1906.10771", needs=("gradient",))
def taylor(w_OI: Tensor, stats: Stats) -> Tensor:
    """|w·g|: how much the loss changes, to first order, when the weight becomes zero."""
    return (w_OI * stats["gradient"]).abs()
