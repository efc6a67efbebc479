"""The founding assignments and balance losses: what the papers say of them."""

import itertools
import math

import pytest
import torch

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.moe import MoE, Plan, RouteContext, Routing
from pumice.moe.assign.balanced import auction, exact

D, F, E = 16, 8, 4


def routing_of(tokens=24, experts=E, seed=0, skew=0.0, **given):
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    logits[:, 0] += skew
    logits.requires_grad_()
    return Routing(logits, logits.softmax(1), **given)


def assign(name, routing, context=None, **options):
    return registry.assign.bind({"name": name, **options})(routing, context or RouteContext(training=True))


def images(count, length):
    return RouteContext(
        batch=count, seqlen=length, segment_T=torch.arange(count).repeat_interleave(length), training=True
    )


class TestTokenChoice:
    def test_without_a_capacity_nothing_is_dropped(self):
        plan = assign("token_choice", routing_of(skew=9.0), top_k=2)
        assert plan.dropped == 0
        assert int(plan.load_E.sum()) == 48
        assert plan.load_E[0] == 24

    def test_no_expert_takes_more_than_its_capacity_and_earlier_tokens_and_first_choices_go_first(self):
        routing = routing_of(skew=9.0)
        plan = assign("token_choice", routing, top_k=2, capacity=0.5)
        room = math.ceil(0.5 * 24 * 2 / E)
        assert plan.load_E.max() == room
        assert plan.token_A[: plan.offsets_E1[1]].tolist() == list(range(room))
        assert plan.dropped == 48 - int(plan.load_E.sum())
        # Second choices of early tokens do not displace first choices of late ones.
        logits = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [1.0, 2.0]])
        plan = assign("token_choice", Routing(logits, logits.softmax(1)), top_k=2, capacity=0.5)
        assert plan.combine_TE.argmax(1).tolist() == [0, 0, 1, 1]
        assert plan.load_E.tolist() == [2, 2]

    def test_priority_keeps_the_largest_weights(self):
        routing = routing_of(skew=9.0)
        plan = assign("token_choice", routing, top_k=1, capacity=0.5, order="priority")
        kept = plan.token_A[: plan.offsets_E1[1]]
        best = routing.weight_TE[:, 0].topk(len(kept)).indices
        assert set(kept.tolist()) == set(best.tolist())

    def test_all_experts_is_the_dense_mixture(self):
        routing = routing_of()
        assert torch.equal(assign("token_choice", routing, top_k=E).combine_TE, routing.weight_TE)

    def test_candidates_stand_for_experts(self):
        draw = torch.Generator().manual_seed(0)
        weight = torch.rand(10, 3, generator=draw)
        names = torch.randint(0, 100_000, (10, 3), generator=draw)
        routing = Routing(weight, weight, candidate_TC=names, experts=100_000)
        plan = assign("token_choice", routing, top_k=1)
        assert plan.experts == 100_000
        best = names.gather(1, weight.argmax(1, keepdim=True)).flatten()
        assert sorted(plan.expert_A.tolist()) == sorted(best.tolist())
        everything = assign("threshold", routing)
        assert len(everything.token_A) == 30
        torch.testing.assert_close(everything.weight_A.sum(), weight.sum())


class TestExpertChoice:
    @pytest.mark.parametrize("top_k", [1, 2, 3])
    def test_every_expert_has_the_same_load_and_its_best_tokens(self, top_k):
        routing = routing_of(skew=5.0)
        plan = assign("expert_choice", routing, top_k=top_k)
        each = 24 * top_k // E
        assert plan.load_E.tolist() == [each] * E
        for expert in range(E):
            mine = plan.token_A[plan.offsets_E1[expert] : plan.offsets_E1[expert + 1]]
            assert set(mine.tolist()) == set(routing.weight_TE[:, expert].topk(each).indices.tolist())

    def test_every_expert_with_all_tokens_is_the_dense_mixture(self):
        routing = routing_of()
        assert torch.equal(assign("expert_choice", routing, top_k=E).combine_TE, routing.weight_TE)


class TestBalanced:
    @pytest.mark.parametrize("solver", [exact, lambda score: auction(score, 1e-6)])
    @pytest.mark.parametrize(("tokens", "experts"), [(6, 3), (7, 3), (2, 3), (5, 2), (4, 1), (1, 3)])
    def test_it_is_the_best_of_all_balanced_assignments(self, solver, tokens, experts):
        score = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens))
        allowed = {tokens // experts, -(-tokens // experts)}
        totals = [
            sum(score[t, e].item() for t, e in enumerate(choice))
            for choice in itertools.product(range(experts), repeat=tokens)
            if {choice.count(e) for e in range(experts)} <= allowed
        ]
        found = solver(score)
        assert set(torch.bincount(found, minlength=experts).tolist()) <= allowed
        assert score.gather(1, found[:, None]).sum().item() == pytest.approx(max(totals), abs=1e-4)

    @pytest.mark.parametrize("tolerance", [1e-1, 1e-3])
    @pytest.mark.parametrize("kind", ["random", "skewed", "clustered", "equal", "integer"])
    def test_the_auction_is_within_its_bound_of_scipy(self, kind, tolerance):
        draw = torch.Generator().manual_seed(0)
        score = torch.randn(90, 8, generator=draw)
        if kind == "skewed":
            score[:, 0] += 10
        elif kind == "clustered":
            score = torch.randn(90, 1, generator=draw) @ torch.randn(1, 8, generator=draw)
        elif kind == "equal":
            score = torch.zeros(90, 8)
        elif kind == "integer":
            score = score.round()
        best, found = exact(score), auction(score, tolerance)
        total, ours = (score.gather(1, e[:, None]).sum().item() for e in (best, found))
        padding = -90 % 8
        spread = float(score.max() - score.min()) or 1.0
        assert total - (90 + padding) * tolerance * spread - 1e-3 <= ours <= total + 1e-3
        assert set(torch.bincount(found, minlength=8).tolist()) <= {11, 12}

    def test_training_is_balanced_and_evaluation_is_greedy(self):
        routing = routing_of(skew=5.0)
        assert assign("balanced", routing).load_E.tolist() == [6] * E
        plan = assign("balanced", routing, RouteContext(training=False))
        assert torch.equal(plan.combine_TE.argmax(1), routing.logits_TE.argmax(1))
        with pytest.raises(PumiceError, match="forbids no experts"):
            assign("balanced", routing_of(allowed_TE=torch.ones(24, E, dtype=torch.bool)))

    def test_the_weight_is_the_sigmoid_of_the_assigned_logit(self):
        layer = MoE.from_recipe("base-layer", D, F, experts=E)
        x = torch.randn(24, D)
        layer(x)
        logits = x @ layer.router.weight_ED.t()
        wanted = logits.sigmoid()[layer.plan.token_A, layer.plan.expert_A]
        torch.testing.assert_close(layer.plan.weight_A, wanted)
        assert layer.aux_loss == 0


class TestSoft:
    def test_slots_are_averages_of_tokens_and_tokens_averages_of_slots(self):
        plan = assign("soft", routing_of(24, 12, slots=3), images(2, 12))
        assert plan.dispatch_GLS.shape == (2, 12, 12)
        torch.testing.assert_close(plan.dispatch_GLS.sum(1), torch.ones(2, 12))
        torch.testing.assert_close(plan.combine_GLS.sum(2), torch.ones(2, 12))
        torch.testing.assert_close(plan.load_E, torch.full((4,), 6.0))

    def test_images_do_not_see_each_other(self):
        layer = MoE.from_recipe("soft-moe", D, F, experts=E)
        x = torch.randn(3, 5, D)
        torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]))

    def test_the_order_of_tokens_does_not_matter(self):
        layer = MoE.from_recipe("soft-moe", D, F, experts=E)
        x, order = torch.randn(1, 7, D), torch.randperm(7)
        torch.testing.assert_close(layer(x)[:, order], layer(x[:, order]))


class TestMerge:
    def test_linear_experts_merged_are_linear_experts_mixed(self):
        layer = MoE(D, F, E, assign="merge", kind={"name": "mlp", "activation": "relu"}, shared=0, by="segment")
        # With one sign throughout, ReLU is the identity, and merging only the second matrix is linear in the weights.
        layer.experts.up_proj.data = layer.experts.up_proj.data[:1].abs().expand(E, -1, -1).clone()
        x = torch.rand(2, 5, D)
        y = layer(x)
        every = layer.experts.every(x.view(-1, D)).view(2, 5, E, D)
        torch.testing.assert_close(y, torch.einsum("ge,gled->gld", layer.plan.weight_GE, every))

    def test_smear_is_the_average_of_all_and_meo_of_the_best(self):
        routing = routing_of(24)
        context = images(2, 12)
        mean = routing.weight_TE.view(2, 12, E).mean(1)
        torch.testing.assert_close(assign("merge", routing, context).weight_GE, mean)
        meo = assign("merge", routing, context, top_k=2).weight_GE
        assert ((meo > 0).sum(1) == 2).all()
        torch.testing.assert_close(meo.sum(1), mean.topk(2).values.sum(1))

    def test_one_expert_kept_is_that_expert(self):
        layer = MoE(D, F, E, {"name": "linear", "renormalise": True}, "merge", top_k=1, shared=0, by="segment")
        x = torch.randn(2, 5, D)
        y = layer(x)
        best = layer.plan.weight_GE.argmax(1)
        torch.testing.assert_close(layer.plan.weight_GE.max(1).values, torch.ones(2))
        every = layer.experts.every(x.view(-1, D)).view(2, 5, E, D)
        for image in range(2):
            torch.testing.assert_close(y[image], every[image, :, best[image]])


def test_threshold_selects_what_is_positive_and_weighs_it_continuously():
    logits = torch.randn(24, E, generator=torch.Generator().manual_seed(0)).requires_grad_()
    routing = Routing(logits, logits.relu())
    plan = assign("threshold", routing)
    assert torch.equal(plan.combine_TE, logits.relu())
    plan.combine_TE.square().sum().backward()
    assert torch.equal(logits.grad != 0, logits > 0)
    negative = Routing(-torch.rand(5, E), torch.zeros(5, E))
    assert assign("threshold", negative).load_E.sum() == 0
    assert assign("threshold", negative, least=1).load_E.sum() == 5


class TestBalance:
    def loss(self, name, plan, **options):
        return registry.balance.bind({"name": name, **options})(plan, RouteContext())

    def test_load_is_one_when_even_and_E_when_all_go_to_one_expert(self):
        even = torch.eye(E).repeat(3, 1)
        plan = Plan.top_k(even.argmax(1, keepdim=True), torch.ones(12, 1), E, Routing(even, torch.full((12, E), 1 / E)))
        assert self.loss("load", plan) == pytest.approx(1)
        one = torch.zeros(12, E)
        one[:, 2] = 1
        plan = Plan.top_k(one.argmax(1, keepdim=True), torch.ones(12, 1), E, Routing(one, one))
        assert self.loss("load", plan) == pytest.approx(E)

    def test_the_gradient_of_load_pushes_down_the_full_expert(self):
        routing = routing_of(skew=3.0)
        plan = assign("token_choice", routing, top_k=1)
        (gradient,) = torch.autograd.grad(self.loss("load", plan), routing.logits_TE)
        assert gradient[:, 0].sum() > 0
        assert gradient[:, 1:].sum() < 0

    def test_load_counts_what_is_asked_for_before_the_capacity(self):
        routing = routing_of(skew=3.0)
        free = assign("token_choice", routing, top_k=1)
        tight = assign("token_choice", routing, top_k=1, capacity=0.25)
        assert self.loss("load", tight) == self.loss("load", free)

    def test_importance_is_the_squared_coefficient_of_variation(self):
        index = torch.tensor([[0], [0], [0], [1]])
        plan = Plan.top_k(index, torch.ones(4, 1), 2)
        assert self.loss("importance", plan) == pytest.approx(1 / 4)
        assert self.loss("importance", Plan.top_k(index.fill_(1), torch.ones(4, 1), 2)) == pytest.approx(1)

    def test_z_and_entropy_of_known_logits(self):
        logits = torch.zeros(3, E)
        plan = Plan.top_k(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), E, Routing(logits, logits.softmax(1)))
        assert self.loss("z", plan) == pytest.approx(math.log(E) ** 2)
        assert self.loss("entropy", plan) == pytest.approx(math.log(E))
        assert self.loss("entropy", plan, sign=-1.0) == pytest.approx(-math.log(E))
