"""Magnitude pruning."""

from torch import Tensor

from pumice.core.registry import scorer
from pumice.core.stats import Stats


@scorer("magnitude", paper="LeCun et al. 1989; Han et al., arXiv:1506.02626")
def magnitude(w_OI: Tensor, stats: Stats) -> Tensor:
    """|W|: small weights matter least; needs no data and knows nothing of the inputs."""
    del stats
    return w_OI.abs()
