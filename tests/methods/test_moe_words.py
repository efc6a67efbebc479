"""Mixture of Word Experts: a word has its expert, and experts get equal shares of a corpus."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import RouteContext
from pumice.moe.route.words import dealt
from tests.methods.moe_parts import D, layer, router, tokens


def test_a_zipf_corpus_is_dealt_evenly():
    counts = 1e6 / torch.arange(1, 5001).double() ** 0.5
    load = torch.zeros(64).double().index_add(0, dealt(counts, 64), counts)
    assert load.max() / load.mean() < 1.01
    in_turn = torch.zeros(64).double().index_add(0, torch.arange(5000) % 64, counts)
    assert load.max() < 0.75 * in_turn.max()


def test_the_bound_of_greedy_dealing():
    counts = torch.tensor([5.0, 5, 4, 4, 3, 3, 3])
    load = torch.zeros(3).double().index_add(0, dealt(counts, 3), counts.double())
    assert load.max() <= 4 / 3 * 9


def test_many_experts_without_a_matrix_of_tokens_by_experts():
    moe = layer("words", experts=20000, d_ff=1, kind="neurons", top_k=1)
    assert moe.router.expert_V.shape == (32000,)
    ids = torch.arange(40) * 700
    moe(tokens(), RouteContext(token_ids_T=ids))
    assert moe.plan.routing.logits_TE.shape == (40, 1)
    first = torch.stack([moe.plan.token_A, moe.plan.expert_A])
    assert torch.equal(first[1][first[0].argsort()], moe.router.expert_V[ids])


def test_pieces_of_a_word_share_its_expert_whatever_the_tokens():
    made = router("words", vocabulary=100)
    context = RouteContext(token_ids_T=torch.arange(6), extra={"word_ids_T": torch.tensor([[7, 7, 7], [9, 9, 7]])})
    routing = made(tokens(6), context)
    assert routing.candidate_TC.flatten().tolist() == [7, 7, 7, 1, 1, 7]


def test_layers_share_one_memory():
    first = layer("words", top_k=1)
    second = layer("words", experts=first.experts, top_k=1)
    context = RouteContext(token_ids_T=torch.arange(40))
    assert torch.equal(first(tokens(), context), second(tokens(), context))
    assert len({id(p) for moe in (first, second) for p in moe.experts.parameters()}) == 2


def test_bad_input():
    with pytest.raises(PumiceError, match="word ids up to 100 with vocabulary=100"):
        router("words", vocabulary=100)(torch.zeros(1, D), RouteContext(token_ids_T=torch.tensor([100])))
    with pytest.raises(PumiceError, match="counts_V"):
        router("words", vocabulary=100).fit(torch.ones(5))
