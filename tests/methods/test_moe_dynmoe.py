"""DynMoE: learned thresholds decide how many experts, and the number of experts follows what tokens activate."""

import pytest
import torch
import torch.nn.functional as F

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext
from pumice.moe.grow import tune

D, E = 12, 6


def made(experts=E, **options):
    torch.manual_seed(0)
    return MoE(D, 8, experts, "top_any", "threshold", shared=0, balance={}, **options)


def score(router, x):
    return (F.normalize(x, dim=1) @ F.normalize(router.weight_ED, dim=1).t()).sigmoid()


def test_experts_above_their_thresholds_are_averaged():
    layer, x = made(), torch.randn(50, D)
    with torch.no_grad():
        layer.router.threshold_E.copy_(torch.linspace(-0.4, 0.4, E))
    active = score(layer.router, x) > layer.router.threshold_E.sigmoid()
    y = layer(x)
    count = active.sum(1, keepdim=True)
    assert len(count.unique()) > 2, "tokens have different numbers of experts"
    torch.testing.assert_close(layer.plan.combine_TE, active / count.clamp_min(1))
    by_hand = (layer.experts.every(x) * active[:, :, None]).sum(1) / count.clamp_min(1)
    torch.testing.assert_close(y, by_hand)


def test_a_token_without_experts_gets_none_in_training_and_its_best_in_use():
    layer, x = made(), torch.randn(20, D)
    with torch.no_grad():
        layer.router.threshold_E.fill_(10.0)
    assert not layer(x).any()
    assert int(layer.router.missed) == 20
    torch.testing.assert_close(layer.router.missed_D, x.sum(0))
    layer.eval()(x)
    best = score(layer.router, x).argmax(1)
    torch.testing.assert_close(layer.plan.combine_TE, F.one_hot(best, E).float())
    assert int(layer.router.missed) == 20, "use does not count"


def test_gradients_pass_the_step_to_the_margins_of_active_experts():
    layer, x = made(), torch.randn(50, D)
    router = layer.router
    routing = router(x, RouteContext())
    other = torch.randn(50, E)
    gradient = torch.autograd.grad((routing.weight_TE * other).sum(), router.threshold_E)[0]
    active = score(router, x) > router.threshold_E.sigmoid()
    active_or_best = active | (F.one_hot(score(router, x).argmax(1), E).bool() & ~active.any(1, keepdim=True))
    slope = router.threshold_E.sigmoid() * (1 - router.threshold_E.sigmoid())
    expected = -(other * active / active_or_best.sum(1, keepdim=True)).sum(0) * slope
    torch.testing.assert_close(gradient, expected.detach())


def test_the_loss_asks_for_orthogonal_short_vectors():
    router = made().router
    unit = F.normalize(router.weight_ED, dim=1)
    torch.testing.assert_close(router.loss(), (unit @ unit.t() - torch.eye(E)).norm() + 1.0, atol=1e-5, rtol=0)
    with torch.no_grad():
        router.weight_ED.copy_(3 * torch.ones(E, D) / D**0.5)
    assert float(router.loss().detach()) == pytest.approx((E * (E - 1)) ** 0.5 + 3, abs=1e-4)


def test_idle_experts_go_and_missed_tokens_get_a_new_one():
    layer, x = made(), torch.randn(40, D)
    with torch.no_grad():
        layer.router.threshold_E[1] = layer.router.threshold_E[4] = 10.0
        layer.router.threshold_E[0] = -10.0
    layer(x)
    assert layer.unused() == [1, 4]
    before, probe = {n: w.clone() for n, w in layer.experts.weights().items()}, torch.randn(5, D)
    with torch.no_grad():
        old = layer(probe)
    assert tune(layer) == ([1, 4], 0), "expert 0 takes every token, so that none is missed"
    assert layer.experts.experts == layer.router.experts == 4
    for name, weight in layer.experts.weights().items():
        assert torch.equal(weight, before[name][[0, 2, 3, 5]])
    torch.testing.assert_close(layer(probe), old)
    with torch.no_grad():
        layer.router.threshold_E.fill_(10.0)
        layer.router.threshold_E[3] = 0.0
    layer.reset_seen()
    layer(x)
    missed = ~(score(layer.router, x) > layer.router.threshold_E.sigmoid()).any(1)
    removed, added = tune(layer)
    assert (removed, added) == ([0, 1, 2], 1)
    torch.testing.assert_close(layer.router.weight_ED[1], x[missed].mean(0))
    assert layer.router.threshold_E[1] == 0
    assert int(layer.router.missed) == 0
    assert layer.unused() == [0, 1]
    (layer(x).square().sum() + layer.aux_loss).backward()
    assert layer.plan.experts == 2
    assert int(layer.plan.load_E[1]) > 0, "the new expert takes tokens that had none"
    assert all(p.grad is not None for p in layer.parameters())


def test_a_checkpoint_of_a_tuned_layer_loads_into_one_of_its_size():
    layer, x = made(), torch.randn(40, D)
    with torch.no_grad():
        layer.router.threshold_E[2] = 10.0
    layer(x)
    removed, added = tune(layer)
    other = made(experts=E - len(removed) + added)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x), layer.eval()(x))


def test_one_expert_stays_and_other_routers_are_refused():
    layer = made()
    assert tune(layer)[0] == [1, 2, 3, 4, 5], "nobody has had a token"
    assert layer.experts.experts == 1
    with pytest.raises(PumiceError, match="top_any"):
        tune(MoE(D, 8, E))
