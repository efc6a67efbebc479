"""CFSP: blocks that turn the stream less give more FFN channels, and of these the weakest. Letters: U units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import shrink
from pumice.prune.shrink.base import Job, removable
from pumice.prune.shrink.blocks import find_blocks, find_parts, sample, similarities
from pumice.prune.shrink.budget import shares
from pumice.prune.shrink.ffn import activation_norms, ffn_groups
from pumice.prune.shrink.refit import check_refit, cut
from pumice.prune.trace import Group

WIDEST = 128
"""Widths are multiples of it where an FFN is wide; elsewhere of the power of two near a 64th of its width."""


@dataclass(frozen=True)
class _Exponents:
    """What the norms of the activations are raised to: with |W_down| (b), and as a factor of the whole score (c)."""

    b: float
    c: float


@shrink("cfsp", key="cfsp", paper="arXiv:2409.13199", needs=("activations",))
def cfsp(
    model: nn.Module,
    job: Job,
    *,
    a: Annotated[float, "how much the blocks' keep ratios differ; 0 gives all the same"] = 13.1,
    b: Annotated[float, "exponent of the activation at the last layer's weight"] = 1.0,
    c: Annotated[float, "exponent of the activation as a factor of the score"] = 1.0,
    refit: Annotated[
        str, "none, layer or dense: what the FFN's last layer is refitted to after channels went"
    ] = "none",
    samples: Annotated[int, "calibration windows; 0 takes all"] = 0,
    multiple: Annotated[int, "channels are kept in multiples of this; 0: a 64th of the width, 128 at most"] = 0,
) -> nn.Module:
    """Remove FFN channels: coarse shares by the angles of the blocks, fine scores by weights and activations (CFSP).

    Coarse: a block's importance I is the mean over tokens of arccos(cos(x_in, x_out)) / π; its FFN keeps a share
    proportional to sigmoid(a (I − mean I)), scaled so that the blocks together meet the density. Fine: a channel's score
    is the mean over its weights of [rel (|W_down| · ‖X‖^b) + rel |W_up| + rel |W_gate|] · ‖X‖^c, where ‖X‖ is the norm of
    its activation and rel divides an entry by the sum over the channels of the same column (of W_up and W_gate: input; of
    W_down: output). Attention stays.

    b = c = 1 are the authors' defaults. Their a = 1 is for the sum of the angles over 128 windows of 1024 tokens, divided
    by 10⁴: 13.1 for the mean. Their program differs in three things. It divides an entry by the sum over the same channel,
    and since the mean over that channel is taken next, every term becomes the same constant and only ‖X‖^c is left; the
    sum over the channels is taken here, under which the weights count. Where a block would keep more than everything, it
    draws all ratios towards their mean; here they are capped. Widths are multiples of 128; here of a smaller power of
    two where the FFN is narrow. Not in the paper: `refit` (see 2ssp).

    Raises:
        PumiceError: blocks that are not norm, attention, norm, FFN; no data; a density that cannot be reached.
    """
    check_refit(refit)
    batches = sample(job, samples or 10**9)
    name, layers = find_blocks(model)
    parts = find_parts(model, layers, batches[0])
    groups = ffn_groups(model, job, name, parts)
    removable(model, groups, job)
    angles = similarities(model, layers, batches, lambda cosine: cosine.acos() / math.pi, job)
    step = multiple or granule(min(group.units for group in groups))
    counts = shares(model, groups, keep_ratios(angles, a), job, step)
    norms = activation_norms(model, groups, batches, job)
    exponents = _Exponents(b, c)
    cuts = [
        (group, select.topk(channel_scores(model, group, norms[group.name], exponents), kept))
        for group, kept in zip(groups, counts, strict=True)
    ]
    cut(model, cuts, batches, job, refit)
    job.notes.append(
        f"{name}: {min(counts)} to {max(counts)} of {groups[0].units} channels per FFN, multiples of {step}"
    )
    return model


def keep_ratios(importance: Sequence[float], a: float) -> list[float]:
    """sigmoid(a (I − mean I)), in proportion to which the blocks keep channels."""
    mean = sum(importance) / len(importance)
    return [1 / (1 + math.exp(-a * (one - mean))) for one in importance]


def granule(width: int) -> int:
    """Power of two near a 64th of the width, 128 at most: 32 of 1536, 128 of 11008."""
    return max(1, min(WIDEST, 2 ** round(math.log2(max(width, 1) / 64)))) if width >= 64 else 1


def channel_scores(model: nn.Module, group: Group, norms_U: Tensor, exponents: _Exponents) -> Tensor:
    """Scores [U] of the channels of one FFN."""
    # The scale cancels; without it a power of large norms could leave the range.
    norm = norms_U / norms_U.mean().clamp(min=1e-30)
    total, count = torch.zeros(group.units), 0
    for role, power in (("in", exponents.b), ("out", 0.0)):
        for weight_UnF in group.weights(model, role).values():
            if weight_UnF.shape[-1] == 1 and role == "out":
                # A bias is no weight.
                continue
            size_UF = weight_UnF.abs().sum(1).cpu() * (norm**power)[:, None]
            total += (size_UF / size_UF.sum(0, keepdim=True).clamp(min=1e-30)).mean(1)
            count += 1
    if not count:
        raise PumiceError(f"{group.name}: no weights to score.")
    return total * norm**exponents.c
