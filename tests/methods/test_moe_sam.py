"""SAM: all of a token's experts lie in one group, and the weights are those of a two-level choice."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext
from pumice.moe.route.sam import SwitchAndMixture

D, E = 8, 12


def made(groups=3, **options):
    torch.manual_seed(0)
    return SwitchAndMixture(D, E, groups=groups, **options)


def test_every_token_stays_in_the_group_that_the_switch_chose():
    torch.manual_seed(0)
    layer = MoE(D, 4, E, {"name": "sam", "groups": 3}, "token_choice", top_k=3, shared=0)
    x = torch.randn(60, D)
    layer(x)
    plan = layer.plan
    chosen = (x @ layer.router.group_GD.t()).argmax(1)
    assert torch.equal(plan.expert_A // 4, chosen[plan.token_A])
    assert (torch.bincount(plan.token_A) == 3).all()
    assert len(chosen.unique()) == 3


def test_weights_are_the_switch_times_the_softmax_within_the_group():
    router, x = made(), torch.randn(7, D)
    switch = (x @ router.group_GD.t()).softmax(1)
    within = (x @ router.expert_ED.t()).view(7, 3, 4).softmax(2)
    weight = router(x, RouteContext()).weight_TE
    torch.testing.assert_close(weight.view(7, 3, 4), switch[:, :, None] * within)
    torch.testing.assert_close(weight.sum(1), torch.ones(7))


def test_one_group_is_the_plain_softmax_router():
    torch.manual_seed(0)
    layer = MoE(D, 4, E, {"name": "sam", "groups": 1}, "token_choice", top_k=2, shared=0)
    plain = MoE(D, 4, layer.experts, "linear", "token_choice", top_k=2, shared=0)
    with torch.no_grad():
        plain.router.weight_ED.copy_(layer.router.expert_ED)
    x = torch.randn(20, D)
    torch.testing.assert_close(layer(x), plain(x))


def test_the_alignment_is_zero_when_both_routers_agree_and_pulls_them_together():
    router, x = made(groups=2, align=1.0, balance=0.0), torch.randn(50, D)
    with torch.no_grad():
        # Every group's experts share one direction, so that their mass follows the switch exactly.
        router.expert_ED.copy_(router.group_GD.repeat_interleave(E // 2, 0))
    agreed = router(x, RouteContext(training=True)).losses["sam_align"].detach()
    assert float(agreed) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        router.expert_ED.normal_()
    optimizer, values = torch.optim.Adam(router.parameters(), lr=0.05), []
    for _ in range(30):
        loss = router(x, RouteContext(training=True)).losses["sam_align"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[0] > 0.1
    assert values[-1] < values[0] / 4


def test_groups_are_balanced_by_a_loss_of_their_own():
    router, x = made(balance=1.0, align=0.0), torch.randn(50, D)
    routing = router(x, RouteContext(training=True))
    switch = (x @ router.group_GD.t()).softmax(1)
    share = torch.bincount(switch.argmax(1), minlength=3) / 50
    torch.testing.assert_close(routing.losses["sam_balance"], 3 * (share * switch.mean(0)).sum())
    assert not router(x, RouteContext()).losses


def test_unequal_groups_are_refused():
    with pytest.raises(PumiceError, match="groups=5 with experts=12"):
        made(groups=5)
