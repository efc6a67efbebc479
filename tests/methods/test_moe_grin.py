"""GRIN: the third-order rule is exact for a cubic loss, and k experts are drawn without replacement."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext, Routing
from pumice.moe.assign.grin import grin
from tests.methods.test_moe_sparsemixer import Problem, error

E = 4


@pytest.mark.parametrize("power", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_the_expectation_is_exact_up_to_a_cubic_loss(power, seed):
    problem = Problem(power, seed)
    torch.testing.assert_close(problem.expected(1 / 3, 0.625, best=False), problem.exact())


def test_with_the_best_expert_at_full_weight_it_is_closer_than_the_usual_gradient():
    problems = [Problem(3, seed) for seed in range(20)]
    ours = [error(problem.expected(1 / 3, 0.625, best=True), problem.exact()) for problem in problems]
    usual = [error(problem.usual(), problem.exact()) for problem in problems]
    assert sum(ours) < 0.8 * sum(usual)


def routing_of(rows):
    logits = torch.tensor([1.0, 0.9, 0.8, 0.7]).repeat(rows, 1)
    return Routing(logits, logits.softmax(1))


def test_experts_are_drawn_one_after_the_other_without_replacement():
    context = RouteContext(training=True, generator=torch.Generator().manual_seed(0))
    routing = routing_of(40000)
    plan = grin(routing, context, jitter=0.3, best=False)
    mask = plan.combine_TE > 0
    assert (mask.sum(1) == 2).all()
    share = routing.logits_TE[0].softmax(0)
    pair = mask.float().t() @ mask.float() / 40000
    for i in range(E):
        for j in range(i):
            chance = share[i] * share[j] / (1 - share[i]) + share[j] * share[i] / (1 - share[j])
            assert float(pair[i, j]) == pytest.approx(float(chance), abs=0.01)


def test_scales_are_one_and_a_third_with_their_chances():
    context = RouteContext(training=True, generator=torch.Generator().manual_seed(0))
    plan = grin(routing_of(40000), context, top_k=1, jitter=0.3, best=False)
    share = routing_of(1).logits_TE[0].softmax(0)[plan.expert_A]
    at_full = torch.isclose(plan.weight_A, share)
    assert float(at_full.float().mean()) == pytest.approx(0.625, abs=0.01)
    torch.testing.assert_close(plan.weight_A[~at_full], share[~at_full] / 3)


def test_use_takes_the_best_ones_each_weighted_among_those_left():
    plan = grin(routing_of(1), RouteContext(), top_k=3, jitter=0.3)
    left = torch.tensor([1.0, 0.9, 0.8, 0.7])
    expected = [float(left[i:].softmax(0)[0]) for i in range(3)]
    torch.testing.assert_close(plan.combine_TE[0], torch.tensor([*expected, 0.0]))


def test_what_is_not_allowed_is_never_drawn_and_the_router_learns():
    torch.manual_seed(0)
    allowed = torch.rand(50, E) > 0.5
    allowed[0] = False
    logits = torch.randn(50, E, requires_grad=True)
    context = RouteContext(training=True, generator=torch.Generator().manual_seed(0))
    plan = grin(Routing(logits, logits.softmax(1), allowed_TE=allowed), context)
    assert allowed[plan.token_A, plan.expert_A].all()
    assert torch.equal(torch.bincount(plan.token_A, minlength=50), allowed.sum(1).clamp_max(2))
    plan.weight_A.square().sum().backward()
    assert torch.isfinite(logits.grad).all()
    layer = MoE(8, 4, E, "linear", "grin", shared=0)
    layer(torch.randn(30, 8), context).square().sum().backward()
    assert layer.router.weight_ED.grad.abs().sum() > 0


def test_more_experts_than_there_are_is_refused():
    with pytest.raises(PumiceError, match="top_k=5"):
        grin(routing_of(1), RouteContext(), top_k=5)
