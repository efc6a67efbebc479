"""How many units of each group stay, so that a model has the parameters that were asked for.

Shapes: U units of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.prune.shrink.base import Job, Scores, block_names
from pumice.prune.trace import Group

ALLOCATIONS = ("uniform", "adaptive")
LEAST = 0.1
"""Share of its units that no group falls below when groups compete."""

Cuts = list[tuple[Group, Tensor]]
"""Groups with the masks [U] of the units that stay."""


class Count:
    """Parameters inside the blocks of a model after units were removed, exactly: weights may lose rows and columns."""

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        inside = {id(p) for name in block_names(model) for p in model.get_submodule(name).parameters()}
        named = {name: p for name, p in model.named_parameters(remove_duplicate=False) if id(p) in inside}
        self.total = sum({id(p): p.numel() for p in named.values()}.values())
        self.groups = list(groups)
        self.reach: dict[str, list[tuple[int, int, int]]] = {}
        for index, group in enumerate(groups):
            for member in group.members:
                if member.name in named:
                    self.reach.setdefault(member.name, []).append((member.axis, index, member.index_Un.shape[1]))
        self.shapes = {name: list(named[name].shape) for name in self.reach}

    def after(self, kept: Sequence[int]) -> int:
        """Parameters left when group i keeps kept[i] units."""
        total = self.total
        for name, reach in self.reach.items():
            before, after = 1, 1
            shape = list(self.shapes[name])
            for axis, index, width in reach:
                shape[axis] -= width * (self.groups[index].units - kept[index])
            for old, new in zip(self.shapes[name], shape, strict=True):
                before, after = before * old, after * new
            total -= before - after
        return total


def rounded(group: Group, count: float, multiple: int) -> int:
    """A number of units near `count`: whole heads, channels in steps of `multiple` (of one where they are few)."""
    if group.kind == "head":
        return max(1, min(group.units, round(count)))
    step = multiple if group.units >= 4 * multiple else 1
    return max(step, min(group.units, int(count + 1e-6) // step * step)) if count < group.units else group.units


def choose(model: nn.Module, groups: Sequence[Group], scores: Scores, job: Job, allocation: str, multiple: int) -> Cuts:
    """Which units stay.

    Args:
        scores: group name -> [U]; the highest stay.
        allocation: "uniform" (every group keeps the same share of its own best), or "adaptive" (all units compete by
            score, no group falls below a tenth).
        multiple: numbers of channels are rounded down to multiples of it.

    Raises:
        PumiceError: an unknown allocation, or a density that these groups cannot reach.
    """
    check_allocation(allocation, multiple)
    if allocation == "uniform":
        counts = uniform(model, groups, job, multiple)
        return [(g, select.topk(scores[g.name], kept)) for g, kept in zip(groups, counts, strict=True)]
    counts = _adaptive(model, groups, scores, job, multiple)
    return [(g, select.topk(scores[g.name], kept)) for g, kept in zip(groups, counts, strict=True)]


def check_allocation(allocation: str, multiple: int) -> None:
    if allocation not in ALLOCATIONS:
        raise PumiceError(f"allocation={allocation!r} is unknown: write one of {', '.join(ALLOCATIONS)}.")
    if multiple < 1:
        raise PumiceError(f"multiple={multiple} must be at least 1.")


def uniform(model: nn.Module, groups: Sequence[Group], job: Job, multiple: int) -> list[int]:
    """Units that each group keeps when all keep the same share: as many as the density allows."""
    return shares(model, groups, [1.0] * len(groups), job, multiple)


def shares(model: nn.Module, groups: Sequence[Group], weights: Sequence[float], job: Job, multiple: int) -> list[int]:
    """Units that each group keeps when its share is proportional to its weight (1 at most).

    Heads are few, so that their shares are coarse: once their numbers are found, the channels make up for the rest.
    """
    steps = 4096
    top = 1 / max(min(weights), 1e-6)
    fixed: dict[int, int] = {}

    def at(step: int) -> list[int]:
        share = top * step / steps
        return [
            fixed.get(index, rounded(g, g.units * min(1.0, share * weight), multiple))
            for index, (g, weight) in enumerate(zip(groups, weights, strict=True))
        ]

    counts = at(_last(steps, at, model, groups, job))
    fixed = {index: counts[index] for index, group in enumerate(groups) if group.kind == "head"}
    return at(_last(steps, at, model, groups, job)) if fixed else counts


def _adaptive(model: nn.Module, groups: Sequence[Group], scores: Scores, job: Job, multiple: int) -> list[int]:
    units = [group.units for group in groups]
    every = torch.cat([_protected(scores[group.name]) for group in groups])

    def at(keep: int) -> list[int]:
        parts = torch.split(select.topk(every, keep), units)
        return [rounded(g, int(part.sum()), multiple) for g, part in zip(groups, parts, strict=True)]

    return at(_last(len(every), at, model, groups, job))


def _protected(scores: Tensor) -> Tensor:
    """Scores with those of a group's best beyond any other."""
    safe = select.topk(scores, select.keep_count(len(scores), LEAST))
    return scores.double().masked_fill(safe, torch.inf)


def _last(most: int, at: Callable[[int], list[int]], model: nn.Module, groups: Sequence[Group], job: Job) -> int:
    """The largest step 0..most whose counts fit into the density; counts grow with the step."""
    count = Count(model, groups)
    allowed = count.total * job.density + 0.5
    least = at(0)
    if count.after(least) > allowed:
        share = count.after(least) / count.total
        kinds = " and ".join(sorted({f"{group.kind}s" for group in groups}))
        raise PumiceError(
            f"density={job.density:g} cannot be reached by removing {kinds} alone: with the fewest that may stay "
            f"{share:.1%} of the parameters inside the blocks are left; ask for more than that, or take another method."
        )
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if count.after(at(middle)) <= allowed:
            low = middle
        else:
            high = middle - 1
    return low
