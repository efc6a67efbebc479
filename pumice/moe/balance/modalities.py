"""Tokens choose firmly, modalities broadly: the entropy losses of LIMoE.

Legend: T tokens, E experts, M modalities.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from pumice.core.registry import balance
from pumice.moe.balance.columns import probabilities
from pumice.moe.plan import AnyPlan
from pumice.moe.routing import RouteContext


def _by_modality(plan: AnyPlan, context: RouteContext, modality: int | None, who: str) -> list[Tensor]:
    """The probabilities [·, E] of each modality that occurs; of one only, if asked for."""
    probability_TE = probabilities(plan, who)
    modality_T = context.modality_T
    if modality_T is None:
        modality_T = torch.zeros(probability_TE.shape[0], dtype=torch.int64, device=probability_TE.device)
    wanted = torch.unique(modality_T).tolist() if modality is None else [modality]
    parts = [probability_TE[modality_T == one] for one in wanted]
    return [part for part in parts if part.shape[0]] or [probability_TE[:0]]


@balance("local_entropy", key="limoe", paper="arXiv:2206.02770", weight=0.04)
def local_entropy(
    plan: AnyPlan,
    context: RouteContext,
    *,
    modality: Annotated[int | None, "only this one; none is all of them"] = None,
) -> Tensor:
    """Mean entropy of a token's probabilities, of each modality for itself, averaged over modalities; in nats.

    Minimised, tokens choose firmly. LIMoE puts it on text, whose few tokens would otherwise stay undecided. O(T E).
    """
    parts = _by_modality(plan, context, modality, "local_entropy")
    return torch.stack([torch.special.entr(part).sum() / max(part.shape[0], 1) for part in parts]).mean()


@balance("global_entropy", key="limoe", paper="arXiv:2206.02770", weight=0.04)
def global_entropy(
    plan: AnyPlan,
    context: RouteContext,
    *,
    least: Annotated[float, "τ in nats: a modality should spread over e^τ experts at least"] = 1.386,
    modality: Annotated[int | None, "only this one; none is all of them"] = None,
) -> Tensor:
    """max(0, τ - H(mean over the tokens of a modality of p)), averaged over modalities.

    Zero, without a gradient, once each modality uses at least e^τ experts evenly (4 by default), or more unevenly; it
    does not ask for more. O(T E).
    """
    parts = _by_modality(plan, context, modality, "global_entropy")
    short = [(least - torch.special.entr(part.mean(0)).sum()).clamp_min(0) for part in parts if part.shape[0]]
    return torch.stack(short).mean() if short else parts[0].sum()
