"""MaskMoE: a rare word always meets the same expert, a frequent one may choose among its own set."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import RouteContext
from tests.methods.moe_parts import E, assigned, router, tokens

V = 50


def make(**options):
    return router("maskmoe", vocabulary=V, frequent=0.2, **{"visible": 4, **options})


def test_sizes_of_the_sets_and_rare_inside_frequent():
    made = make()
    assert made.visible_VE[:10].sum(1).tolist() == [4] * 10
    assert made.visible_VE[10:].sum(1).tolist() == [1] * 40
    before = made.visible_VE.clone()
    made.fit(torch.arange(V))
    assert made.visible_VE[-10:].sum(1).tolist() == [4] * 10
    assert ((before & made.visible_VE).sum(1) >= 1).all(), "a word that becomes frequent keeps its expert"


def test_rare_words_meet_one_expert_in_every_context():
    made = make()
    ids = torch.full((40,), 33)
    plan = assigned("token_choice", made(tokens(), RouteContext(token_ids_T=ids)), top_k=2)
    assert (plan.load_E > 0).sum() == 1
    assert plan.load_E.sum() == 40
    torch.testing.assert_close(plan.weight_A, torch.ones(40))


def test_frequent_words_choose_within_their_set_with_its_softmax():
    made = make()
    ids = torch.full((40,), 3)
    routing = made(tokens(), RouteContext(token_ids_T=ids))
    seen = made.visible_VE[3]
    torch.testing.assert_close(routing.weight_TE[:, seen], routing.logits_TE[:, seen].softmax(1))
    plan = assigned("token_choice", routing, top_k=2)
    assert not plan.load_E[~seen].any()
    assert (plan.load_E > 0).sum() > 1


def test_all_visible_is_the_plain_router():
    made = make(visible=None, rare=E)
    routing = made(tokens(), RouteContext(token_ids_T=torch.arange(40)))
    torch.testing.assert_close(routing.weight_TE, routing.logits_TE.softmax(1))


def test_bad_input():
    with pytest.raises(PumiceError, match="token ids up to 50 with vocabulary=50"):
        make()(tokens(2), RouteContext(token_ids_T=torch.tensor([0, 50])))
    with pytest.raises(PumiceError, match="rare=9"):
        make(rare=9)
    with pytest.raises(PumiceError, match="by='token'"):
        make()(tokens(2), RouteContext(token_ids_T=torch.arange(4)))
