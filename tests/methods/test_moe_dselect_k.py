"""DSelect-k: selectors are products of smooth bits, and training ends with exactly k experts."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext
from pumice.moe.route.dselect_k import DSelectK, smooth_step

D = 8


def made(experts, **options):
    torch.manual_seed(0)
    return DSelectK(D, experts, **options)


def test_the_smooth_step_saturates_exactly_and_joins_smoothly():
    for gamma in (0.7, 1.0, 3.0):
        t = torch.linspace(-gamma, gamma, 401, dtype=torch.float64, requires_grad=True)
        s = smooth_step(t, gamma)
        assert (s[t <= -gamma / 2] == 0).all()
        assert (s[t >= gamma / 2] == 1).all()
        inside = t.detach().abs() < gamma / 2
        cubic = -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5
        torch.testing.assert_close(s[inside], cubic[inside])
        slope = torch.autograd.grad(s.sum(), t)[0]
        torch.testing.assert_close(slope, (1.5 / gamma - 6 * t.detach() ** 2 / gamma**3) * inside)


@pytest.mark.parametrize("experts", [1, 2, 5, 8])
@pytest.mark.parametrize("static", [False, True])
def test_a_selector_is_the_product_over_the_bits_of_an_expert(experts, static):
    router = made(experts, top_k=3, static=static)
    with torch.no_grad():
        router.bit_bias_KB.copy_(torch.randn_like(router.bit_bias_KB) / 3)
    x = torch.randn(4, D)
    selector, share = router.selectors(x)
    for t in range(4):
        for k in range(3):
            z = router.bit_bias_KB[k] if static else router.bit_bias_KB[k] + router.bit_KBD[k] @ x[t]
            for e in range(experts):
                product = torch.ones(())
                for bit, value in enumerate(z):
                    step = smooth_step(value, 1.0)
                    product = product * (step if e >> bit & 1 else 1 - step)
                torch.testing.assert_close(selector[t, k, e], product)
    weight = router(x, RouteContext()).weight_TE
    torch.testing.assert_close(weight, torch.einsum("tk,tke->te", share, selector))
    if experts in (1, 2, 8):
        torch.testing.assert_close(weight.sum(1), torch.ones(4))


def fit(router, x, steps, target):
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(steps):
        routing = router(x, RouteContext(training=True))
        loss = (routing.weight_TE - target).square().sum(1).mean() + sum(routing.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return router(x, RouteContext()).weight_TE.detach()


def test_a_static_gate_finds_two_experts_and_has_no_third():
    target = torch.zeros(8)
    target[2], target[5] = 0.3, 0.7
    weight = fit(made(8, static=True, entropy=0.005), torch.zeros(1, D), 250, target)
    assert (weight[0] > 0).nonzero().flatten().tolist() == [2, 5]
    torch.testing.assert_close(weight[0], target, atol=0.02, rtol=0)


def test_the_entropy_ends_in_at_most_k_experts_for_every_token():
    x = torch.randn(16, D, generator=torch.Generator().manual_seed(2))
    router = made(8, entropy=1.0)
    before = router(x, RouteContext()).weight_TE
    assert ((before > 0).sum(1) == 8).all(), "a new gate uses all experts"
    weight = fit(router, x, 150, 0)
    assert ((weight > 0).sum(1) <= 2).all()
    torch.testing.assert_close(weight.sum(1), torch.ones(16))


def test_codes_of_no_expert_are_left():
    router = made(5, top_k=1, static=True, entropy=0.0, reach=1.0)
    with torch.no_grad():
        router.bit_bias_KB.copy_(torch.tensor([[0.3, 0.3, 0.3]]))
    assert router(torch.zeros(1, D), RouteContext()).weight_TE.sum() < 0.3
    weight = fit(router, torch.zeros(1, D), 200, torch.full((5,), 0.2))
    assert float(weight.sum()) == pytest.approx(1, abs=0.02)


def test_the_layer_runs_only_what_is_selected():
    torch.manual_seed(0)
    layer = MoE(D, 4, 8, {"name": "dselect_k", "top_k": 2, "static": True}, "threshold", shared=0)
    with torch.no_grad():
        layer.router.bit_bias_KB.copy_(torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]]))
    x = torch.randn(3, D)
    y = layer(x)
    assert layer.plan.load_E.tolist() == [0, 0, 3, 0, 0, 3, 0, 0]
    share = layer.router.share_bias_K.softmax(0)
    every = layer.experts.every(x)
    torch.testing.assert_close(y, share[0] * every[:, 5] + share[1] * every[:, 2])


def test_what_cannot_be_is_refused():
    for options in ({"top_k": 0}, {"gamma": 0.0}):
        with pytest.raises(PumiceError, match=next(iter(options))):
            made(4, **options)
