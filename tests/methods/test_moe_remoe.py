"""ReMoE: routing is continuous, and λ steers the share of zeros to 1 - k / E."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext
from pumice.moe.route.remoe import ReMoE

T, D, E = 64, 16, 8


def tokens(count=T, seed=0):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def made(**options):
    torch.manual_seed(0)
    return ReMoE(D, E, **options)


def test_weights_are_the_positive_logits_and_the_layer_runs_exactly_those():
    torch.manual_seed(0)
    layer = MoE(D, 8, E, "remoe", "threshold", shared=0)
    x = tokens()
    y = layer(x)
    logits = x @ layer.router.weight_ED.t()
    by_hand = (logits.clamp_min(0)[:, :, None] * layer.experts.every(x)).sum(1)
    torch.testing.assert_close(y, by_hand)
    assert layer.plan.token_A.shape[0] == int((logits > 0).sum())


def test_the_output_is_continuous_where_an_expert_joins():
    torch.manual_seed(0)
    layer = MoE(D, 8, E, "remoe", "threshold", shared=0).eval()
    top_k = MoE(D, 8, layer.experts, "linear", "token_choice", top_k=2, shared=0).eval()
    x = tokens(1)
    with torch.no_grad():
        unit = x[0] / x[0].square().sum()

        def jump(moe, place):
            at = []
            for offset in (-1e-4, 1e-4):
                moe.router.weight_ED.copy_(torch.zeros(E, D))
                moe.router.weight_ED[:3] = torch.tensor([[1.0], [0.5], [place + offset]]) * unit
                at.append(moe(x))
            return float((at[0] - at[1]).norm() / at[0].norm())

        assert jump(layer, 0.0) < 1e-3, "an expert joins with weight 0"
        assert jump(top_k, 0.5) > 1e-2, "top-k jumps where two experts swap"


def test_lambda_moves_by_alpha_towards_the_target():
    router, context = made(active=2, alpha=1.2, initial=1e-3), RouteContext(training=True)
    with torch.no_grad():
        router.weight_ED.fill_(1.0)
        router(torch.ones(4, D), context)
        assert float(router.coefficient) == pytest.approx(1.2e-3), "all are active: too dense"
        router.weight_ED[:7] = -1.0
        router(torch.ones(4, D), context)
        assert float(router.coefficient) == pytest.approx(1e-3), "one of eight: too sparse"
        router.weight_ED[6:] = 1.0
        router(torch.ones(4, D), context)
        assert float(router.coefficient) == pytest.approx(1e-3), "exactly two"
        router(torch.ones(4, D), RouteContext(training=False))
        router(torch.ones(0, D), context)
        assert float(router.coefficient) == pytest.approx(1e-3), "only training steps with tokens count"


def test_the_loss_is_lambda_times_the_l1_norm_weighted_by_load():
    router = made(active=2, initial=0.5)
    x = tokens()
    routing = router(x, RouteContext(training=True))
    weight = routing.weight_TE.detach()
    load = (weight > 0).float().sum(0) * E / (2 * T)
    torch.testing.assert_close(routing.losses["remoe"].detach(), 0.5 * (weight * load).sum() / T)
    gradient = torch.autograd.grad(routing.losses["remoe"], routing.weight_TE)[0]
    torch.testing.assert_close(gradient, (0.5 * load / T).expand(T, E))
    plain = made(active=2, initial=0.5, balance=False)(x, RouteContext(training=True))
    torch.testing.assert_close(plain.losses["remoe"].detach(), 0.5 * weight.sum() / T)


def test_training_ends_at_the_wanted_sparsity_and_a_checkpoint_continues_it():
    router = made(active=2, alpha=1.2, initial=1e-4)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.3)
    shares = []
    for step in range(300):
        x = tokens(256, seed=step) + 0.5
        routing = router(x, RouteContext(training=True))
        # A task that wants large weights keeps the router from closing for good.
        loss = routing.losses["remoe"] - 0.05 * (1 - torch.exp(-routing.weight_TE)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append(float((routing.weight_TE > 0).float().sum(1).mean()))
    assert shares[0] > 3.5
    assert sum(shares[-200:]) / 200 == pytest.approx(2, abs=0.5)
    other = made(active=2)
    other.load_state_dict(router.state_dict())
    assert float(other.coefficient) == float(router.coefficient) != 1e-8


def test_what_cannot_be_is_refused():
    for options in ({"active": 9}, {"active": 0}, {"alpha": 1.0}, {"initial": 0.0}):
        with pytest.raises(PumiceError, match=next(iter(options))):
            made(**options)
