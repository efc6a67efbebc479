"""MoEC: every cluster loses the same share of experts in training, and the variance terms split the total variance."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import RouteContext, Routing
from tests.methods.moe_parts import E, assigned, balance, draw, router, tokens, training


def make(**options):
    return router("clusters", clusters=2, dropout=0.5, interval=3, **options)


def test_half_of_every_cluster_sleeps_and_is_drawn_anew_after_the_interval():
    made, context = make(), training()
    masks = [made(tokens(), context).allowed_TE for _ in range(9)]
    for mask in masks:
        assert (mask.view(40, 2, 4).sum(2) == 2).all()
        assert torch.equal(mask, mask[:1].expand_as(mask)), "the same experts for all tokens"
    assert torch.equal(masks[0], masks[2])
    assert len({tuple(mask[0].tolist()) for mask in masks}) > 1


def test_a_token_of_a_sleeping_expert_falls_to_a_sibling_where_siblings_are_alike():
    made = make()
    with torch.no_grad():
        made.weight_ED.copy_(draw(2, 16, seed=3).repeat_interleave(4, 0) + 0.01 * draw(8, 16, seed=4))
    plain = assigned("token_choice", made(tokens(), RouteContext()), top_k=1)
    asleep = assigned("token_choice", made(tokens(), training()), top_k=1)
    cluster = [plan.expert_A[plan.token_A.argsort()] // 4 for plan in (plain, asleep)]
    assert torch.equal(*cluster)


def test_everybody_is_awake_in_evaluation():
    made = make()
    made(tokens(), training())
    assert made(tokens(), RouteContext()).allowed_TE is None


def test_a_new_draw_leaves_the_old_backward_pass_alone():
    made, context = router("clusters", clusters=2, interval=1), training()
    first = made(tokens(), context).weight_TE
    made(tokens(seed=2), context)
    first.square().sum().backward()
    assert made.weight_ED.grad.any()


def plan_of(probability_TE):
    return assigned("token_choice", Routing(probability_TE.log(), probability_TE), top_k=1)


def test_variance_terms():
    p = draw(30, E).softmax(1)
    within = balance("clusters", plan_of(p), clusters=2, apart=0.0)
    between = within - balance("clusters", plan_of(p), clusters=2, apart=1.0)
    torch.testing.assert_close(within + between, E**2 * p.var(1, unbiased=False).mean())
    alike = torch.tensor([[0.25] * 4 + [0.0] * 4])
    torch.testing.assert_close(balance("clusters", plan_of(alike), clusters=2), torch.tensor(-(E**2) / 64.0))
    uniform = torch.full((1, E), 1 / E)
    assert balance("clusters", plan_of(uniform), clusters=2) > balance("clusters", plan_of(alike), clusters=2)


def test_bad_input():
    with pytest.raises(PumiceError, match="clusters=3"):
        router("clusters", clusters=3)
