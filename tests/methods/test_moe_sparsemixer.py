"""SparseMixer: summed over all draws its gradient is the exact one for a quadratic loss, and the usual one is not."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext, Routing
from pumice.moe.assign.sparsemixer import estimate, near_best, sparsemixer

E, D = 4, 3


class Problem:
    """One token; the loss of running expert i with weight w is f(w · output_i)."""

    def __init__(self, power, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(E, generator=draw).double().requires_grad_()
        self.output = torch.randn(E, D, generator=draw).double()
        self.target = torch.randn(D, generator=draw).double()
        self.power = power

    def loss(self, weight, expert):
        z = weight * self.output[expert]
        return ((z - self.target) ** 2).sum() if self.power == 2 else ((z - self.target) ** 3 + (z @ z)).sum()

    def exact(self):
        """Gradient of the expected loss, all experts run."""
        share = self.logits.softmax(0)
        total = sum(share[i] * self.loss(share[i], i) for i in range(E))
        return torch.autograd.grad(total, self.logits)[0]

    def expected(self, part, whole, best):
        """Expectation of the estimated gradient over the draws of expert and scale."""
        top, total = int(self.logits.argmax()), torch.zeros(E).double()
        for i in range(E):
            for scale, chance in ((1.0, whole), (part, 1 - whole)):
                if best and i == top:
                    scale = 1.0
                share = self.logits.softmax(0)
                weight = estimate(share[i], torch.tensor(scale))
                assert float(weight.detach()) == pytest.approx(scale * float(share[i].detach()))
                gradient = torch.autograd.grad(self.loss(weight, i), self.logits)[0]
                total += float(share[i].detach()) * chance * gradient
        return total

    def usual(self):
        """Expectation of the gradient through the weight of the drawn expert only."""
        total = torch.zeros(E).double()
        for i in range(E):
            share = self.logits.softmax(0)
            gradient = torch.autograd.grad(self.loss(share[i], i), self.logits)[0]
            total += float(share[i].detach()) * gradient
        return total


def error(estimated, exact):
    return float((estimated - exact).norm() / exact.norm())


@pytest.mark.parametrize("seed", range(5))
def test_the_expectation_is_exact_for_a_quadratic_loss(seed):
    problem = Problem(2, seed)
    torch.testing.assert_close(problem.expected(0.5, 0.5, best=False), problem.exact())
    assert error(problem.usual(), problem.exact()) > 0.1, "without the correction a part is missing"


def test_with_the_best_expert_at_full_weight_it_is_still_closer_than_without():
    problems = [Problem(2, seed) for seed in range(20)]
    ours = [error(problem.expected(0.5, 0.5, best=True), problem.exact()) for problem in problems]
    usual = [error(problem.usual(), problem.exact()) for problem in problems]
    assert sum(ours) < 0.8 * sum(usual)


def test_the_mid_point_is_no_longer_exact_for_a_cubic_loss():
    errors = [error(Problem(3, seed).expected(0.5, 0.5, False), Problem(3, seed).exact()) for seed in range(5)]
    assert max(errors) > 1e-4


def test_draws_follow_the_softmax_and_the_coin_the_rule():
    logits = torch.tensor([1.0, 0.8, 0.9, -3.0]).repeat(40000, 1)
    context = RouteContext(training=True, generator=torch.Generator().manual_seed(0))
    routing = Routing(logits, logits.softmax(1))
    plan = sparsemixer(routing, context, jitter=0.15, best=False)
    share = torch.tensor([1.0, 0.8, 0.9]).softmax(0)
    torch.testing.assert_close(plan.load_E[:3] / 40000, share, atol=0.01, rtol=0)
    assert plan.load_E[3] == 0, "no jitter makes it the best"
    at_full = torch.isclose(plan.weight_A, share[plan.expert_A])
    torch.testing.assert_close(plan.weight_A[~at_full], share[plan.expert_A[~at_full]] / 2)
    assert float(at_full.float().mean()) == pytest.approx(0.5, abs=0.01)
    plan = sparsemixer(routing, context, jitter=0.15)
    at_full = torch.isclose(plan.weight_A, share[plan.expert_A])
    assert at_full[plan.expert_A == 0].all()
    assert float(at_full[plan.expert_A == 1].float().mean()) == pytest.approx(0.5, abs=0.02)


def test_a_jitter_decides_who_can_be_drawn():
    logits = torch.tensor([[2.0, 1.9, 1.0, -1.0], [-1.0, -1.1, -2.0, -3.0]])
    assert torch.isfinite(near_best(logits, 0.1)).tolist() == [[True, True, False, False]] * 2
    assert torch.isfinite(near_best(torch.zeros(1, 4), 0.1)).all()


def test_use_takes_the_best_expert_at_its_weight():
    torch.manual_seed(0)
    layer = MoE(8, 4, E, "linear", "sparsemixer", shared=0).eval()
    x = torch.randn(30, 8)
    assert torch.equal(layer(x), layer(x))
    logits = layer.plan.routing.logits_TE
    best = logits.argmax(1)
    assert torch.equal(layer.plan.combine_TE.argmax(1), best)
    share = near_best(logits, 0.1).softmax(1).amax(1)
    torch.testing.assert_close(layer.plan.combine_TE.amax(1), share)
    layer.train()(x, RouteContext(generator=torch.Generator().manual_seed(0))).square().sum().backward()
    assert layer.router.weight_ED.grad.abs().sum() > 0


def test_a_jitter_of_nothing_is_refused():
    with pytest.raises(PumiceError, match="jitter=0"):
        sparsemixer(Routing(torch.zeros(1, 4), torch.ones(1, 4)), RouteContext(), jitter=0.0)
