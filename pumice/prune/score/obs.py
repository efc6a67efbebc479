"""Optimal Brain Surgeon saliency of a layer's own output error."""

from typing import Annotated

import torch
from torch import Tensor

from pumice.core.linalg import damped_inverse
from pumice.core.registry import scorer
from pumice.core.stats import Stats


@scorer("obs", simpler="wanda", paper="Hassibi & Stork 1992; arXiv:2301.00774", needs=("hessian",))
def obs(
    w_OI: Tensor, stats: Stats, *, damp: Annotated[float, "share of the mean Hessian diagonal added to it"] = 0.01
) -> Tensor:
    """w²/[H⁻¹]ⱼⱼ: the output error left after the other weights have made up for the removed one.

    With the recovery `obs` the saliency is taken again column block by column block, with what is already
    compensated (SparseGPT); alone, it is taken once.
    """
    inverse, _ = damped_inverse(stats["hessian"], damp)
    # Inputs that calibration never saw cannot matter; damping alone would give them a score.
    seen = torch.diagonal(stats["hessian"]) > 0
    return w_OI.square() / torch.diagonal(inverse) * seen
