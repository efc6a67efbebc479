"""CompeteSMoE: a competition sends tokens to the experts of largest response, and the router learns to foresee it."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext
from pumice.moe.route.compete import responses

D, E = 8, 6


def made(rate, **options):
    torch.manual_seed(0)
    return MoE(D, 8, E, {"name": "compete", "rate": rate, **options}, "token_choice", top_k=2, shared=0, balance={})


def test_a_competition_routes_to_the_experts_with_the_largest_outputs():
    layer, x = made(rate=1.0), torch.randn(30, D)
    layer(x)
    norm = torch.stack([layer.experts.every(x)[:, e].norm(dim=1) for e in range(E)], 1)
    value, index = norm.topk(2, dim=1)
    expected = torch.zeros(30, E).scatter(1, index, value.softmax(1))
    torch.testing.assert_close(layer.plan.combine_TE, expected)


def test_without_competition_it_is_the_linear_router_and_so_it_is_in_use():
    layer, x = made(rate=0.0), torch.randn(30, D)
    plain = MoE(D, 8, layer.experts, {"name": "linear", "renormalise": True}, top_k=2, shared=0, balance={})
    with torch.no_grad():
        plain.router.weight_ED.copy_(layer.router.weight_ED)
    torch.testing.assert_close(layer(x), plain(x))
    assert not layer.plan.losses
    layer.router.rate = 1.0
    torch.testing.assert_close(layer.eval()(x), plain(x))


def test_the_share_of_competitions_is_the_rate():
    layer, x = made(rate=0.3), torch.randn(2, D)
    context = RouteContext(generator=torch.Generator().manual_seed(0))
    hits = 0
    for _ in range(400):
        layer(x, context)
        hits += "compete" in layer.plan.losses
    assert hits / 400 == pytest.approx(0.3, abs=0.06)


def test_the_lesson_changes_only_the_router_and_the_output_only_the_experts():
    layer, x = made(rate=1.0), torch.randn(30, D)
    layer(x)
    layer.aux_loss.backward()
    assert layer.router.weight_ED.grad.abs().sum() > 0
    assert all(p.grad is None or not p.grad.any() for p in layer.experts.parameters())
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert layer.router.weight_ED.grad is None or not layer.router.weight_ED.grad.any()
    assert all(p.grad.abs().sum() > 0 for p in layer.experts.parameters())


def test_the_lesson_is_the_squared_error_with_the_winners_once_more():
    layer, x = made(rate=1.0, distil=0.5, winners=2), torch.randn(30, D)
    layer(x)
    theirs = responses(x, layer.experts).softmax(1)
    error = ((x @ layer.router.weight_ED.t()).softmax(1) - theirs).square()
    winners = error.gather(1, theirs.topk(2, dim=1).indices)
    torch.testing.assert_close(layer.plan.losses["compete"], 0.5 * (error.mean() + winners.mean()))


def test_the_router_learns_who_wins():
    layer = made(rate=1.0, distil=1.0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Expert e answers strongly to tokens along direction e only.
        layer.experts.gate_up_proj.copy_(layer.experts.gate_up_proj * 0.1)
        for e in range(E):
            layer.experts.gate_up_proj[e, :, e] += 2.0
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.05)

    def agreement():
        x = torch.randn(200, D, generator=draw)
        winner = responses(x, layer.experts).argmax(1)
        return float(((x @ layer.router.weight_ED.t()).argmax(1) == winner).float().mean())

    before = agreement()
    for _ in range(100):
        layer(torch.randn(64, D, generator=draw))
        optimizer.zero_grad()
        layer.aux_loss.backward()
        optimizer.step()
    after = agreement()
    assert before < 0.35
    assert after > before + 0.2


def test_what_cannot_be_is_refused():
    with pytest.raises(PumiceError, match="rate=2"):
        made(rate=2.0)
    with pytest.raises(PumiceError, match="experts"):
        made(rate=1.0).router(torch.randn(2, D), RouteContext(training=True))
