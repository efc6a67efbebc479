"""Width pruning by magnitude: the control that every measured score has to beat."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from pumice.core.registry import shrink
from pumice.prune.shrink.base import MULTIPLE, Job, inner_groups
from pumice.prune.shrink.budget import choose
from pumice.prune.trace import Group, remove_all


@shrink("width", paper="arXiv:1608.08710")
def width(
    model: nn.Module,
    job: Job,
    *,
    heads: Annotated[bool, "remove heads and KV groups as well as channels"] = False,
    allocation: Annotated[str, "uniform (an ordinary checkpoint) or adaptive (all units compete)"] = "uniform",
    multiple: Annotated[int, "channels are kept in multiples of this"] = MULTIPLE,
) -> nn.Module:
    """Remove the channels inside the blocks (and heads) whose weights are smallest.

    A unit's score is the root mean square of all its weights, in the matrices that make it and in those that read it;
    nothing is compensated. Filter pruning by the ℓ1 norm of a filter's own weights (the paper) is the same idea; here
    the readers count too and the norm is ℓ2. With `adaptive` the scores of each group are divided by their mean.
    """
    groups = inner_groups(model, job, ("channel", "head") if heads else ("channel",))
    scores = {group.name: magnitude(model, group) for group in groups}
    if allocation == "adaptive":
        scores = {name: score / score.mean().clamp(min=1e-30) for name, score in scores.items()}
    remove_all(model, choose(model, groups, scores, job, allocation, multiple))
    return model


def magnitude(model: nn.Module, group: Group) -> Tensor:
    """Root mean square of every unit's weights, [U]."""
    squares = torch.zeros(group.units, dtype=torch.float64)
    count = 0
    for role in ("out", "in"):
        for weight_UnF in group.weights(model, role).values():
            squares += weight_UnF.double().square().sum((1, 2)).cpu()
            count += weight_UnF[0].numel()
    return (squares / max(count, 1)).sqrt().float()
