"""DeepSeekMoE: a bias that only selects, groups of experts, thin experts, balance of groups and sequences."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import Plan, RouteContext, Routing
from tests.methods.moe_parts import D, E, assigned, balance, draw, layer, router, tokens


def test_the_bias_selects_and_leaves_weights_and_gradients_alone():
    made = router("deepseek")
    plain = made(tokens(), RouteContext())
    made.bias_E[3] = 5.0
    biased = made(tokens(), RouteContext())
    assert torch.equal(plain.weight_TE, biased.weight_TE)
    plan = assigned("token_choice", biased, top_k=2)
    assert plan.load_E[3] == 40
    assert not biased.select_TE.requires_grad
    token, expert = plan.token_A, plan.expert_A
    chosen = torch.zeros(40, E).index_put((token, expert), plan.routing.weight_TE[token, expert], accumulate=True)
    torch.testing.assert_close(plan.combine_TE, chosen / chosen.sum(1, keepdim=True))


def test_the_bias_goes_against_the_load_by_one_step_in_training_only():
    moe = layer({"name": "deepseek", "update": 0.01}, top_k=2)
    moe.eval()(tokens())
    assert not moe.router.bias_E.any()
    moe.train()(tokens())
    load = moe.plan.load_E.float()
    torch.testing.assert_close(moe.router.bias_E, 0.01 * torch.sign(load.mean() - load))


def test_the_bias_balances_a_lopsided_router():
    made = router("deepseek", update=0.01)
    with torch.no_grad():
        made.weight_ED.copy_(draw(E, D, seed=7) * 0.3)
        x, load = tokens(200) + 2.0, []
        for _ in range(250):
            plan = assigned("token_choice", made(x, RouteContext(training=True)), top_k=2)
            load.append(float(plan.load_E.max()) / 50)
            made.observe(plan)
    assert load[0] > 2
    assert load[-1] < 1.2


def test_groups_limit_where_a_token_may_go():
    made = router("deepseek", groups=4, kept_groups=2, best=2, scale=2.5)
    made.bias_E.copy_(0.1 * draw(E, seed=3))
    routing = made(tokens(), RouteContext())
    plan = assigned("token_choice", routing, top_k=3)
    for t in range(40):
        score = routing.select_TE[t].view(4, 2).sum(1)
        groups = set((plan.expert_A[plan.token_A == t] // 2).tolist())
        assert groups <= set(score.topk(2).indices.tolist())
    torch.testing.assert_close(plan.combine_TE.sum(1), torch.full((40,), 2.5))
    free = router("deepseek", groups=4, kept_groups=4)(tokens(), RouteContext())
    assert free.allowed_TE is None


def test_thin_experts_that_are_all_chosen_are_the_thick_one():
    """An expert cut into m thinner ones is their sum: with all of them chosen with weight 1 nothing changes."""
    thick, thin = layer(experts=1, d_ff=8, top_k=1), layer(experts=4, d_ff=2)
    with torch.no_grad():
        gate, up = thick.experts.gate_up_proj[0].chunk(2)
        thin.experts.gate_up_proj.copy_(torch.cat([gate.view(4, 2, D), up.view(4, 2, D)], 1))
        thin.experts.down_proj.copy_(thick.experts.down_proj[0].view(D, 4, 2).transpose(0, 1))
    x = tokens()
    ones = torch.ones(40, 4)
    torch.testing.assert_close(
        thin.experts(x, Plan.mask(ones.bool(), ones)), thick.experts(x, Plan.everything(40, x)), rtol=1e-4, atol=1e-5
    )


def plan_of(probability, k=2):
    return assigned("token_choice", Routing(probability.log(), probability), top_k=k)


def test_group_loss():
    p = draw(40, E).softmax(1).requires_grad_()
    plan = plan_of(p)
    torch.testing.assert_close(balance("group_load", plan, groups=E), balance("load", plan))
    torch.testing.assert_close(balance("group_load", plan, groups=1), torch.tensor(1.0))
    f = E * plan.load_E / 80
    by_hand = sum(f[g * 2 : g * 2 + 2].mean() * p.mean(0)[g * 2 : g * 2 + 2].sum() for g in range(4))
    torch.testing.assert_close(balance("group_load", plan, groups=4), by_hand)


def test_sequence_loss_is_the_mean_of_each_sequence_alone():
    p = draw(40, E).softmax(1)
    segment = torch.arange(2).repeat_interleave(20)
    both = balance("sequence_load", plan_of(p), RouteContext(segment_T=segment, batch=2))
    alone = [balance("load", plan_of(part)) for part in p.split(20)]
    torch.testing.assert_close(both, torch.stack(alone).mean())


def test_bad_input():
    with pytest.raises(PumiceError, match="groups=3"):
        router("deepseek", groups=3)
    with pytest.raises(PumiceError, match="kept_groups=5"):
        router("deepseek", groups=4, kept_groups=5)
