"""The founding routers: what the papers say of them."""

import pytest
import torch

from pumice.core import registry
from pumice.moe import MoE, RouteContext
from pumice.moe.balance.smooth_load import smooth_load_E

D, E = 16, 8


def make(name, **options):
    torch.manual_seed(0)
    return registry.router.bind({"name": name, **options})(D, E)


def tokens(count=50, seed=1):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def training(seed=0, **given):
    return RouteContext(training=True, generator=torch.Generator().manual_seed(seed), **given)


def test_switch_weights_are_the_softmax_over_all_experts():
    routing = make("linear")(tokens(), RouteContext())
    torch.testing.assert_close(routing.weight_TE.sum(1), torch.ones(50))
    torch.testing.assert_close(routing.weight_TE, routing.probability_TE)
    assert torch.equal(make("linear", gate="sigmoid")(tokens(), RouteContext()).weight_TE, routing.logits_TE.sigmoid())


def test_jitter_multiplies_inputs_only_in_training():
    router = make("linear", jitter=0.1)
    assert torch.equal(router(tokens(), RouteContext()).logits_TE, make("linear")(tokens(), RouteContext()).logits_TE)
    ones = torch.ones(4000, D)
    logits = router(ones, training()).logits_TE
    mean = router(ones, RouteContext()).logits_TE[0]
    # Each factor has variance jitter² / 3.
    wanted = (0.01 / 3 * router.weight_ED.square().sum(1)).sqrt()
    torch.testing.assert_close(logits.std(0), wanted, rtol=0.1, atol=0)
    torch.testing.assert_close(logits.mean(0), mean, atol=5e-3, rtol=0)


class TestNoisy:
    def test_it_starts_at_zero_with_noise_of_log_two(self):
        router = make("noisy")
        assert not router(tokens(), RouteContext()).logits_TE.any()
        noisy = router(tokens(5000), training()).logits_TE
        assert noisy.std().item() == pytest.approx(0.6931, rel=0.05)
        assert noisy.mean().abs() < 0.02

    def test_the_weights_of_the_chosen_are_the_softmax_over_the_chosen(self):
        layer = MoE(D, 8, E, make("noisy"), {"name": "token_choice", "top_k": 3}, balance={})
        torch.nn.init.normal_(layer.router.gate_ED)
        layer(tokens(20), training())
        noisy = layer.plan.routing.logits_TE
        value, index = noisy.topk(3)
        wanted = torch.zeros(20, E).scatter(1, index, value.softmax(1))
        torch.testing.assert_close(layer.plan.combine_TE, wanted)

    def test_the_smooth_load_is_the_probability_of_being_chosen_when_the_noise_is_drawn_again(self):
        draw = torch.Generator().manual_seed(0)
        clean = torch.randn(1, E, generator=draw)
        deviation = torch.rand(1, E, generator=draw) + 0.2
        noisy = clean + deviation * torch.randn(1, E, generator=draw)
        smooth = smooth_load_E(clean, deviation, noisy, 3)
        for expert in range(E):
            again = noisy.repeat(20000, 1)
            again[:, expert] = clean[0, expert] + deviation[0, expert] * torch.randn(20000, generator=draw)
            chosen = (again.topk(3).indices == expert).any(1).float().mean()
            assert smooth[expert].item() == pytest.approx(chosen.item(), abs=0.015)

    def test_all_experts_chosen_is_a_load_of_all_tokens(self):
        ones = torch.ones(7, E)
        assert torch.equal(smooth_load_E(ones, ones, ones, E), torch.full((E,), 7.0))

    def test_the_load_loss_reaches_the_router(self):
        layer = MoE.from_recipe("sparsely-gated-moe", D, 8, experts=E)
        layer(tokens(20))
        for name in ("importance", "smooth_load"):
            layer.zero_grad()
            layer.plan.losses[name].backward(retain_graph=True)
            assert layer.router.gate_ED.grad.any(), name


class TestHash:
    def test_a_word_always_meets_the_same_experts_and_words_spread_evenly(self):
        router = make("hash")
        ids = torch.arange(20000)
        first = router(torch.zeros(20000, D), RouteContext(token_ids_T=ids))
        choice = first.score_TE.topk(2).indices
        again = router(tokens(20000), RouteContext(token_ids_T=ids.flip(0))).score_TE.topk(2).indices
        assert torch.equal(choice, again.flip(0)), "states do not matter"
        for rank in range(2):
            share = torch.bincount(choice[:, rank], minlength=E) / 20000
            torch.testing.assert_close(share, torch.full((E,), 1 / E), atol=0.01, rtol=0)
        pairs = torch.bincount(choice[:, 0] * E + choice[:, 1], minlength=E * E).view(E, E) / 20000
        assert not pairs.diagonal().any()
        torch.testing.assert_close(pairs + torch.eye(E) / (E * (E - 1)), torch.full((E, E), 1 / 56), atol=0.005, rtol=0)

    def test_another_seed_is_another_hash(self):
        context = RouteContext(token_ids_T=torch.arange(2000))
        one, two = (make("hash", seed=seed)(torch.zeros(2000, D), context).score_TE.argmax(1) for seed in (0, 1))
        assert (one == two).float().mean().item() == pytest.approx(1 / E, abs=0.03)

    def test_it_learns_nothing(self):
        assert not list(make("hash").parameters())


class TestCosine:
    def test_only_directions_count(self):
        router = make("cosine")
        before = router(tokens(), RouteContext()).logits_TE
        torch.testing.assert_close(router(tokens() * 37, RouteContext()).logits_TE, before)
        router.experts_EP.data *= torch.rand(E, 1) + 0.5
        torch.testing.assert_close(router(tokens(), RouteContext()).logits_TE, before)

    def test_scores_are_bounded_by_the_learned_temperature_in_half_the_experts_dimensions(self):
        router = make("cosine", temperature=0.5)
        assert router.project_PD.shape == (E // 2, D)
        assert router(tokens(500), RouteContext()).logits_TE.abs().max() <= 2.0 + 1e-5
        router(tokens(), RouteContext()).weight_TE.max().backward()
        assert router.log_temperature.grad != 0


class TestSmear:
    def test_dropped_experts_have_no_weight_and_the_rest_sums_to_one(self):
        router = make("smear", dropout=0.5)
        weight = router(tokens(2000), training()).weight_TE
        torch.testing.assert_close(weight.sum(1), torch.ones(2000))
        assert (weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
        assert (router(tokens(), RouteContext()).weight_TE > 0).all()

    def test_a_row_that_would_lose_all_keeps_all(self):
        assert (make("smear", dropout=1.0)(tokens(), training()).weight_TE > 0).all()


def test_slots_scores_depend_on_directions_and_one_scale():
    router = make("slots", slots=3)
    before = router(tokens(), RouteContext()).logits_TE
    assert before.shape == (50, 3 * E)
    assert before.abs().max() <= 1 + 1e-5
    torch.testing.assert_close(router(tokens() * 9, RouteContext()).logits_TE, before)
    router.scale.data *= 4
    torch.testing.assert_close(router(tokens(), RouteContext()).logits_TE, 4 * before)
