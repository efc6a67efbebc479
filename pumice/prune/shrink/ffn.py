"""The FFNs of a transformer's blocks: their hidden channels as groups, and how strongly each is driven.

Shapes: B samples, T tokens, I hidden channels, U units of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.calls import token_mask
from pumice.core.errors import PumiceError
from pumice.prune.shrink.base import Job, inner_groups
from pumice.prune.shrink.blocks import Parts, passes, rows, watching
from pumice.prune.trace import Group


def ffn_groups(model: nn.Module, job: Job, blocks: str, parts: Sequence[Parts]) -> list[Group]:
    """One group of hidden channels per block, in the order of the blocks.

    Raises:
        PumiceError: an FFN whose hidden channels cannot be removed, or that has several kinds of them.
    """
    found = []
    groups = inner_groups(model, job, ("channel",))
    for index, part in enumerate(parts):
        inside = tuple(f"{blocks}.{index}.{name}" for name in part.ffn)
        own = [group for group in groups if any(f"{group.name}.".startswith(f"{one}.") for one in inside)]
        if len(own) != 1 or len(own[0].readers) != 1:
            raise PumiceError(f"{blocks}.{index}: an FFN of two layers (gated or not) is needed, and this is none.")
        found += own
    return found


def activation_norms(model: nn.Module, groups: Sequence[Group], batches: Sequence[Any], job: Job) -> dict[str, Tensor]:
    """L2 norm over the tokens of a sample of every unit's activation, averaged over samples: name -> [U]."""
    readers = [group.views(model)[group.readers[0].name] for group in groups]
    sums = [torch.zeros(view.shape_OI[1], dtype=torch.float64) for view, _ in readers]
    count = 0
    current: list[tuple[int, Tensor | None]] = []

    def before(batch: Any) -> None:
        current[:] = [(rows(batch), token_mask(batch))]

    def see(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        samples, mask = current[0]
        x = args[0].float().square()
        # Some models flatten their tokens in front of the FFN.
        x = x.unflatten(0, (samples, -1)) if x.dim() == 2 else x
        x = x if mask is None else x * mask[..., None].to(x)
        sums[index] += x.sum(1).sqrt().sum(0).double().cpu()

    with watching([view.module for view, _ in readers], see):
        for batch in passes(model, batches, "activations", job, before):
            count += rows(batch)
    return {
        group.name: (total / max(count, 1))[columns_Um].square().sum(1).sqrt().float()
        for group, (_, columns_Um), total in zip(groups, readers, sums, strict=True)
    }
