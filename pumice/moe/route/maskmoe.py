"""Rare words always meet the same experts, frequent ones may choose: MaskMoE.

Legend: T tokens, D model width, E experts, V vocabulary.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing


@router("maskmoe", key="maskmoe", paper="arXiv:2407.09816", needs=("token_ids_T",), forbids=True)
class MaskMoE(Router):
    """softmax(W x) over the experts that a token's id may see: a fixed random set, of 1 expert for rare ids.

    The sets are drawn once from `seed` and kept in the checkpoint [V, E]. Which ids are frequent comes from
    `fit(counts_V)`; before it the first ids are, since tokenizers number common pieces first. O(T D E).

    The sizes of the sets are options, since the paper's (one expert for rare ids, all or several for frequent ones) and
    its threshold of frequency are from memory.

    Raises:
        PumiceError: a token id outside the vocabulary.
    """

    visible_VE: Tensor

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        vocabulary: Annotated[int, "how many token ids there are"] = 32000,
        frequent: Annotated[float, "share of the ids that occur at all which counts as frequent"] = 0.2,
        visible: Annotated[int | None, "experts that a frequent id sees; none is all"] = None,
        rare: Annotated[int, "experts that a rare id sees"] = 1,
        seed: Annotated[int, "of the sets"] = 0,
    ) -> None:
        super().__init__(d_model, experts)
        self.vocabulary, self.frequent, self.seed = vocabulary, frequent, seed
        self.visible, self.rare = experts if visible is None else visible, rare
        for name, value in (("visible", self.visible), ("rare", rare)):
            if not 1 <= value <= experts:
                raise PumiceError(
                    f"{name}={value!r} of router 'maskmoe' is outside 1..{experts}, the experts there are."
                )
        self.weight_ED = nn.Parameter(torch.empty(experts, d_model))
        nn.init.trunc_normal_(self.weight_ED, std=(0.1 / d_model) ** 0.5)
        self.register_buffer("visible_VE", torch.zeros(vocabulary, experts, dtype=torch.bool))
        self.fit(torch.arange(vocabulary, 0, -1))

    def fit(self, counts_V: Tensor) -> None:
        """Take the ids with the largest counts as frequent; the sets' order of experts stays the one of the seed."""
        vocabulary = self.visible_VE.shape[0]
        if counts_V.shape != (vocabulary,):
            raise PumiceError(f"counts_V has shape {tuple(counts_V.shape)}: give a count for each of {vocabulary} ids.")
        draw_VE = torch.rand(vocabulary, self.experts, generator=torch.Generator().manual_seed(self.seed))
        seen = int((counts_V > 0).sum())
        frequent_V = select.topk(counts_V.double().cpu(), round(self.frequent * seen))
        many_VE, few_VE = select.topk(draw_VE, self.visible), select.topk(draw_VE, self.rare)
        self.visible_VE.copy_(torch.where(frequent_V[:, None], many_VE, few_VE))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        ids_T = context.need("token_ids_T", "router 'maskmoe'").long()
        vocabulary = self.visible_VE.shape[0]
        if ids_T.numel() and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < vocabulary:
            raise PumiceError(f"token ids up to {int(ids_T.max())} with vocabulary={vocabulary}: raise vocabulary.")
        if ids_T.numel() != x_TD.shape[0]:
            raise PumiceError(f"{ids_T.numel()} token ids for {x_TD.shape[0]} rows: router 'maskmoe' needs by='token'.")
        visible_TE = self.visible_VE[ids_T]
        logits_TE = F.linear(x_TD, self.weight_ED)
        return Routing(logits_TE, logits_TE.masked_fill(~visible_TE, -torch.inf).softmax(1), allowed_TE=visible_TE)
