"""FLAP: remove what fluctuates least, and put its mean into a bias."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from pumice.core.registry import shrink
from pumice.prune.shrink.base import MULTIPLE, Job, inner_groups
from pumice.prune.shrink.budget import check_allocation, choose
from pumice.prune.shrink.measured import Reader, add_bias, measure
from pumice.prune.trace import remove_all


@shrink("flap", key="flap", paper="arXiv:2312.11983", needs=("input_mean", "input_var"))
def flap(
    model: nn.Module,
    job: Job,
    *,
    heads: Annotated[bool, "remove heads and KV groups as well as channels"] = True,
    allocation: Annotated[str, "adaptive (all units compete, as in the paper) or uniform (an ordinary checkpoint)"] = (
        "adaptive"
    ),
    multiple: Annotated[int, "channels are kept in multiples of this"] = MULTIPLE,
) -> nn.Module:
    """Remove the units whose activations fluctuate least, weighted by what reads them, and add their mean to a bias.

    Score of a column: Var[x_j]·‖W_:j‖² over the columns of the matrices that read the unit; of a head, the mean over
    its columns. With `adaptive` the scores of each group are standardised (mean 0, deviation 1), so that the units of
    all layers compete. What a removed unit contributes on average, W_:j·E[x_j], is added to the reader's bias, which
    makes the mean output of every reader exact. All is measured on the dense model in one pass.

    Standardising columns before a head's mean is taken is what the authors' program does. It differs in two things: it
    squares the scores of attention columns first, for which the paper gives no reason and which is not done here; and its
    search for the threshold (a head counts as 170 channels: 128 columns, no groups) is here an exact count of
    parameters.
    """
    check_allocation(allocation, multiple)
    groups = inner_groups(model, job, ("channel", "head") if heads else ("channel",))
    readers = measure(model, groups, job, frozenset(("input_mean", "input_var")), "flap")
    scores = {name: sum_of([_score(one, allocation == "adaptive") for one in found]) for name, found in readers.items()}
    cuts = choose(model, groups, scores, job, allocation, multiple)
    for group, keep in cuts:
        for reader in readers[group.name]:
            gone = reader.columns(~keep)
            if len(gone):
                add_bias(reader.view, reader.view.read()[:, gone] @ reader.stats["input_mean"][gone])
    remove_all(model, cuts)
    return model


def _score(reader: Reader, standardise: bool) -> Tensor:
    fluctuation = reader.stats["input_var"] * reader.view.read().square().sum(0)
    used = reader.units(fluctuation)
    if standardise:
        used = (used - used.mean()) / used.std().clamp(min=1e-30)
    return used.mean(1)


def sum_of(parts: list[Tensor]) -> Tensor:
    """Scores over several readers."""
    return torch.stack(parts).sum(0)
