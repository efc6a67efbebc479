"""LAMP."""

import torch
from torch import Tensor

from pumice.core.registry import allocation
from pumice.core.stats import Stats
from pumice.prune.allocate.base import Layers, by_threshold


def lamp_scores(w_OI: Tensor, stats: Stats) -> Tensor:
    """w² over the sum of all squares of the layer that are not smaller; equal weights are taken one after the other."""
    del stats
    squares, order = w_OI.double().square().flatten().sort()
    rest = squares.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = squares / rest.clamp(min=torch.finfo(torch.float64).tiny)
    return scores.float().view(w_OI.shape)


@allocation("lamp", key="lamp", paper="arXiv:2010.07611")
def lamp(layers: Layers, density: float) -> dict[str, float]:
    """All weights compete by w²/Σ(squares of the layer not smaller than it): a layer's best weight always scores 1.

    Meant for magnitude pruning, whose order inside a layer it keeps; it then has no parameter and empties no layer.
    """
    return by_threshold(layers, density, lamp_scores, 0.0)
