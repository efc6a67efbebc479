"""The layer's own outputs."""

from torch import Tensor

from pumice.core.registry import goal
from pumice.core.stats import Stats


@goal("layer")
def layer(w_OI: Tensor, stats: Stats) -> Tensor:
    """What the layer would give with all its weights on the inputs that it gets in the pruned model."""
    del stats
    return w_OI
