"""Each word has its expert: Mixture of Word Experts.

Legend: T tokens, D model width, E experts, V routing vocabulary.
"""

from __future__ import annotations

import heapq
from typing import Annotated

import torch
from torch import Tensor

from pumice.core.errors import PumiceError
from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing


def dealt(counts_V: Tensor, experts: int) -> Tensor:
    """expert_V such that the experts' summed counts are about equal: the most frequent word goes to the emptiest expert.

    The fullest expert has at most 4/3 of the least possible maximum (Graham's bound). O(V log E).
    """
    expert_V = torch.empty(counts_V.shape[0], dtype=torch.int64)
    heap = [(0.0, expert) for expert in range(experts)]
    counts = counts_V.double().tolist()
    for word in torch.argsort(counts_V.double(), descending=True, stable=True).tolist():
        load, expert = heap[0]
        expert_V[word] = expert
        # A word that never occurs still takes some room, so that unseen words are spread too.
        heapq.heapreplace(heap, (load + max(counts[word], 1e-3), expert))
    return expert_V


@router("words", key="mowe", paper="arXiv:2311.10768", needs=("token_ids_T",), gradient="none", columns="candidates")
class Words(Router):
    """A fixed table id -> expert: no learned router, tens of thousands of experts, one column a token.

    The ids are `context.extra["word_ids_T"]`, of a large vocabulary of words that knows nothing of the model's
    tokenizer (every piece of a word has the word's id), or else the model's own token ids. `fit(counts_V)` deals words
    to experts so that each gets an equal share of a corpus; before it words are dealt in turn. The weight is 1. O(T).

    The paper deals in buckets of equal frequency so that devices are balanced; here experts themselves are. It shares
    one set of experts among all its layers: give every layer the same `experts=` instance.

    Raises:
        PumiceError: an id outside the vocabulary.
    """

    expert_V: Tensor

    def __init__(
        self, d_model: int, experts: int, *, vocabulary: Annotated[int, "words of the routing vocabulary"] = 32000
    ) -> None:
        super().__init__(d_model, experts)
        self.vocabulary = vocabulary
        self.register_buffer("expert_V", torch.arange(vocabulary) % experts)

    def fit(self, counts_V: Tensor) -> None:
        """Deal the words anew, by how often each occurs."""
        if counts_V.shape != self.expert_V.shape:
            words = self.expert_V.shape[0]
            raise PumiceError(f"counts_V has shape {tuple(counts_V.shape)}: give a count for each of {words} words.")
        self.expert_V.copy_(dealt(counts_V.cpu(), self.experts))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        ids = context.extra.get("word_ids_T")
        ids_T = (context.need("token_ids_T", "router 'words'") if ids is None else ids).reshape(-1).long()
        words = self.expert_V.shape[0]
        if ids_T.numel() != x_TD.shape[0]:
            raise PumiceError(f"context.extra['word_ids_T'] has {ids_T.numel()} entries for {x_TD.shape[0]} tokens.")
        if ids_T.numel() and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < words:
            raise PumiceError(f"word ids up to {int(ids_T.max())} with vocabulary={words}: raise vocabulary.")
        candidate_T1 = self.expert_V[ids_T.to(self.expert_V.device)][:, None]
        zeros_T1 = x_TD.new_zeros(x_TD.shape[0], 1)
        return Routing(zeros_T1, zeros_T1 + 1, candidate_TC=candidate_T1, experts=self.experts)
