"""Experts are taught their classes: the supervised router of Mobile V-MoE.

Legend: T tokens, E experts, C classes, G segments (images).
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.registry import balance
from pumice.moe.balance.columns import probabilities, segment_means, segment_of
from pumice.moe.plan import AnyPlan
from pumice.moe.routing import RouteContext


def superclasses(confusion_CC: Tensor, experts: int) -> Tensor:
    """expert_C: classes that a model confuses go to the same expert, with C / E classes each (rounded up at most).

    `confusion_CC[a, b]` counts images of class a that a trained model took for b. Average-linkage clustering of the
    symmetric confusion, where a merge that would overfill a super-class is skipped; the paper partitions the
    confusion graph (its algorithm is not known here). O(C³).

    Raises:
        PumiceError: no square matrix.
    """
    if confusion_CC.dim() != 2 or confusion_CC.shape[0] != confusion_CC.shape[1]:
        raise PumiceError(f"confusion_CC has shape {tuple(confusion_CC.shape)}: count classes against classes.")
    classes = confusion_CC.shape[0]
    room = -(-classes // experts)
    near_CC = confusion_CC.double().cpu()
    near_CC = near_CC + near_CC.t()
    near_CC.fill_diagonal_(-torch.inf)
    groups = {one: [one] for one in range(classes)}
    while True:
        flat = int(near_CC.argmax())
        a, b = divmod(flat, classes)
        if near_CC[a, b] <= 0:
            break
        if len(groups[a]) + len(groups[b]) > room:
            near_CC[a, b] = near_CC[b, a] = -torch.inf
            continue
        share = len(groups[a]) / (len(groups[a]) + len(groups[b]))
        near_CC[a] = near_CC[:, a] = share * near_CC[a] + (1 - share) * near_CC[b]
        near_CC[b], near_CC[:, b], near_CC[a, a] = -torch.inf, -torch.inf, -torch.inf
        groups[a] += groups.pop(b)
    return _packed(sorted(groups.values(), key=len, reverse=True), classes, experts, room)


def _packed(groups: list[list[int]], classes: int, experts: int, room: int) -> Tensor:
    """Each group to the emptiest expert; what does not fit there whole is divided."""
    expert_C = torch.empty(classes, dtype=torch.int64)
    load = [0] * experts
    for group in groups:
        rest = group
        while rest:
            emptiest = load.index(min(load))
            now, rest = rest[: room - load[emptiest]], rest[room - load[emptiest] :]
            expert_C[now] = emptiest
            load[emptiest] += len(now)
    return expert_C


@balance("superclass", key="mobile-v-moe", paper="arXiv:2309.04354", needs=("labels_G",), weight=0.3)
class Superclass(nn.Module):
    """Cross-entropy between an image's routing and the expert of its class, `expert_C[label]`.

    Use it with `by="segment"`, so that one decision serves an image; otherwise the image's mean probabilities count.
    Before `fit(confusion_CC)` class c belongs to expert c mod E. O(T E).

    Raises:
        PumiceError: no labels, or a label outside the classes.
    """

    expert_C: Tensor

    def __init__(
        self, d_model: int, experts: int, *, classes: Annotated[int, "how many labels there are"] = 1000
    ) -> None:
        super().__init__()
        self.experts = experts
        self.register_buffer("expert_C", torch.arange(classes) % experts)

    def fit(self, confusion_CC: Tensor) -> None:
        """Group the classes by what a trained dense model confuses."""
        if confusion_CC.shape[0] != self.expert_C.shape[0]:
            classes = self.expert_C.shape[0]
            raise PumiceError(f"confusion_CC has shape {tuple(confusion_CC.shape)} for classes={classes}.")
        self.expert_C.copy_(superclasses(confusion_CC, self.experts))

    def forward(self, plan: AnyPlan, context: RouteContext) -> Tensor:
        labels_G = context.need("labels_G", "balance 'superclass'").to(self.expert_C.device)
        segment_T, segments = segment_of(plan, context)
        if labels_G.shape[0] != segments:
            raise PumiceError(f"context.labels_G has {labels_G.shape[0]} entries for {segments} segments.")
        if segments and not 0 <= int(labels_G.min()) <= int(labels_G.max()) < self.expert_C.shape[0]:
            raise PumiceError(
                f"labels up to {int(labels_G.max())} with classes={self.expert_C.shape[0]}: raise classes."
            )
        probability_GE, size_G = segment_means(probabilities(plan, "superclass"), segment_T, segments)
        target_G = self.expert_C[labels_G]
        loss_G = -probability_GE.gather(1, target_G[:, None]).squeeze(1).clamp_min(1e-12).log()
        full_G = size_G > 0
        return (loss_G * full_G).sum() / full_G.sum().clamp_min(1)
