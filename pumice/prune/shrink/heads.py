"""Heads and KV groups removed by what the block loses with them.

Shapes: U heads or KV groups, m columns of one in the output projection.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn

from pumice.core import select
from pumice.core.registry import shrink
from pumice.prune.shrink.base import Job, inner_groups
from pumice.prune.shrink.budget import choose, uniform
from pumice.prune.shrink.measured import Reader, measure
from pumice.prune.shrink.width_ls import compensate, greedy
from pumice.prune.trace import Group, remove_all


@shrink("heads", paper="arXiv:1905.10650", needs=("hessian",))
def heads(
    model: nn.Module,
    job: Job,
    *,
    allocation: Annotated[
        str, "uniform (an ordinary checkpoint) or adaptive (heads of all layers compete)"
    ] = "uniform",
    compensation: Annotated[bool, "refit the output projection on the heads that stay"] = True,
    damp: Annotated[float, "added to the Hessian's diagonal, as a share of its mean"] = 0.01,
) -> nn.Module:
    """Remove attention heads, or KV groups with the query heads that read them, by the error that each leaves behind.

    A head's importance is the mean squared part of the block's output that it makes, tr(W_h H_hh W_hᵀ) with H_hh the
    second moment of its activations; with `compensation`, what of it the other heads cannot replace (structured OBS), and
    the output projection is refitted on those that stay. With `adaptive` the importances are shares of their layer's sum.

    The paper measures a head by the gradient of the loss by a mask on it; this is the same question asked of the block's
    output, which needs no backward pass.
    """
    groups = inner_groups(model, job, ("head",))
    if allocation == "adaptive":
        readers = measure(model, groups, job, frozenset(("hessian",)), "heads")
        scores = {name: _shares(found[0]) for name, found in readers.items()}
        cuts = choose(model, groups, scores, job, allocation, 1)
        for group, keep in cuts:
            if compensation and not bool(keep.all()):
                compensate(readers[group.name][0], keep, damp)
        remove_all(model, cuts)
        return model
    kept = dict(zip((group.name for group in groups), uniform(model, groups, job, 1), strict=True))

    def change(group: Group, readers: list[Reader]) -> None:
        reader, count = readers[0], kept[group.name]
        if count == group.units:
            return
        if compensation:
            keep = greedy(reader.view.read(), reader.stats["hessian"], reader.columns_Um, count, damp)
            compensate(reader, keep, damp)
        else:
            keep = select.topk(contribution(reader), count).cpu()
        remove_all(model, [(group, keep)])

    measure(model, groups, job, frozenset(("hessian",)), "heads", change)
    return model


def contribution(reader: Reader) -> Tensor:
    """tr(W_h H_hh W_hᵀ) of every head, [U]."""
    parts_UOm = reader.view.read()[:, reader.columns_Um].movedim(1, 0)
    columns = reader.columns_Um
    own_Umm = reader.stats["hessian"][columns[:, :, None], columns[:, None, :]]
    return ((parts_UOm @ own_Umm) * parts_UOm).sum((1, 2))


def _shares(reader: Reader) -> Tensor:
    scores = contribution(reader)
    return scores / scores.sum().clamp(min=1e-30)
