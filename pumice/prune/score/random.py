"""Random pruning, the control that every method has to beat."""

from torch import Tensor

from pumice.core.registry import scorer
from pumice.core.stats import Stats


@scorer("random", key="random-pruning-at-init", paper="arXiv:2202.02643", needs=("random",))
def random(w_OI: Tensor, stats: Stats) -> Tensor:
    """Uniform noise, seeded by the layer's name: the control that every score has to beat."""
    del w_OI
    return stats["random"]
