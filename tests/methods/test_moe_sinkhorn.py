"""The routers of the vision study: balanced transport, whose marginals bound what token and expert choice do."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext
from pumice.moe.recipes import recipes
from pumice.moe.route.sinkhorn import transport
from tests.methods.moe_parts import D, E, assigned, draw, router, tokens


def test_marginals():
    plan = transport(draw(40, E) * 3, 200)
    torch.testing.assert_close(plan.sum(1), torch.ones(40))
    torch.testing.assert_close(plan.sum(0), torch.full((E,), 40 / E), rtol=1e-3, atol=0)


def test_it_is_the_entropic_optimum():
    """No small change that keeps the marginals has a better value plus entropy."""
    score = draw(12, 4).double()
    plan = transport(score, 2000)

    def value(p):
        return float((p * score).sum() + torch.special.entr(p).sum())

    for seed in range(5):
        step = draw(12, 4, seed=seed).double()
        step = step - step.mean(0) - step.mean(1, keepdim=True) + step.mean()
        assert value(plan + 1e-3 * step) < value(plan)
    rank_one = plan.log() - score
    torch.testing.assert_close(rank_one - rank_one[:1] - rank_one[:, :1] + rank_one[0, 0], torch.zeros(12, 4).double())


def lopsided():
    made = router("sinkhorn", steps=50)
    with torch.no_grad():
        made.weight_ED.copy_(draw(E, D, seed=7))
    return made, tokens(200) + 1.0


def test_token_choice_by_the_plan_is_better_balanced_than_by_softmax():
    made, x = lopsided()
    routing = made(x, RouteContext())
    by_plan = assigned("token_choice", routing, top_k=1)
    routing.select_TE = None
    by_softmax = assigned("token_choice", routing, top_k=1)
    assert by_plan.load_E.max() < 0.6 * by_softmax.load_E.max()
    token, expert = by_plan.token_A, by_plan.expert_A
    torch.testing.assert_close(by_plan.weight_A, routing.logits_TE.softmax(1)[token, expert])


def test_expert_choice_by_the_plan_leaves_fewer_tokens_out():
    made, x = lopsided()
    routing = made(x, RouteContext())
    reached = [assigned("expert_choice", routing, top_k=1).token_A.unique().numel()]
    routing.select_TE = None
    reached.append(assigned("expert_choice", routing, top_k=1).token_A.unique().numel())
    assert reached[0] > reached[1]


def test_the_study_has_a_recipe_for_each_of_its_routers():
    found = {one.name for one in recipes() if one.key == "vision-moe-router-study"}
    wanted = {f"vision-{side}-choice-{by}" for side in ("token", "expert") for by in ("softmax", "sinkhorn")}
    assert wanted | {"vision-soft-moe"} <= found
    for name in sorted(found):
        torch.manual_seed(0)
        moe = MoE.from_recipe(name, D, 8, experts=E)
        assert moe(tokens(24).view(2, 12, D)).shape == (2, 12, D)
        if "expert" in name or name == "vision-soft-moe":
            assert moe.statistics()["load_cv"] < 1e-3


def test_bad_input():
    with pytest.raises(PumiceError, match="temperature=0"):
        router("sinkhorn", temperature=0)
