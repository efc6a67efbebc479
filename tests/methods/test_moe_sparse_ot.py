"""Sparsity-constrained transport: plain transport at k = 1, quadratic at k = T, never more than k tokens an expert."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext, Routing
from pumice.moe.assign.sparse_ot import dual, semi_dual, sparse_ot, transport

T, E = 12, 3


def scores(tokens=T, experts=E, seed=0):
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).double()


def mass(tokens=T, experts=E):
    return torch.full((experts,), tokens / experts, dtype=torch.float64)


def routing_of(score):
    return Routing(score.float(), score.float())


def test_with_one_token_an_expert_the_semi_dual_is_that_of_plain_transport():
    score, gamma = scores(), 0.3
    for seed in range(5):
        a = torch.randn(T, generator=torch.Generator().manual_seed(seed)).double()
        value, plan = semi_dual(a, score, mass(), 1, gamma)
        plain = a.sum() - (mass() * (a[:, None] + score).amax(0)).sum()
        torch.testing.assert_close(value - gamma / 2 * mass().square().sum(), plain)
        assert ((plan > 0).sum(0) == 1).all()
    rows = np.kron(np.eye(T), np.ones(E)), np.kron(np.ones(T), np.eye(E))
    least = linprog(-score.flatten(), A_eq=np.vstack(rows), b_eq=np.concatenate([np.ones(T), mass()])).fun
    best = max(float(semi_dual(_potential(score, steps), score, mass(), 1, gamma)[0]) for steps in (300, 600))
    assert best - gamma / 2 * float(mass().square().sum()) == pytest.approx(least, abs=0.03)
    assert best - gamma / 2 * float(mass().square().sum()) <= least + 1e-9, "a dual value is a lower bound"


def _potential(score, steps):
    """Ascent on the semi-dual with k = 1, by its supergradient."""
    a = torch.zeros(score.shape[0], dtype=torch.float64)
    for step in range(steps):
        _, plan = semi_dual(a, score, torch.full((score.shape[1],), score.shape[0] / score.shape[1]).double(), 1, 0.3)
        a += 0.1 / (1 + step) ** 0.7 * (1 - plan.sum(1))
    return a


@pytest.mark.parametrize("form", ["semi_dual", "dual"])
@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
def test_without_a_limit_it_is_quadratic_transport(form, solver):
    score, gamma = scores(), 0.5
    plan = transport(score, mass(), T, gamma, form=form, solver=solver, steps=300 if solver == "adam" else 100)
    torch.testing.assert_close(plan.sum(1), torch.ones(T, dtype=torch.float64), atol=2e-2, rtol=0)
    torch.testing.assert_close(plan.sum(0), mass(), atol=2e-2, rtol=0)

    def objective(flat):
        return float(-(flat * score.flatten().numpy()).sum() + gamma / 2 * (flat**2).sum())

    # One constraint follows from the others, which SLSQP does not forgive.
    rows = np.vstack([np.kron(np.eye(T), np.ones(E)), np.kron(np.ones(T), np.eye(E))])[:-1]
    wanted = np.concatenate([np.ones(T), mass().numpy()])[:-1]
    exact = minimize(
        objective,
        np.full(T * E, 1 / E),
        jac=lambda flat: -score.flatten().numpy() + gamma * flat,
        bounds=[(0, None)] * (T * E),
        constraints={"type": "eq", "fun": lambda flat: rows @ flat - wanted, "jac": lambda flat: rows},
        method="SLSQP",
    )
    torch.testing.assert_close(plan.flatten(), torch.from_numpy(exact.x), atol=2e-2, rtol=0)


def test_a_column_maximises_its_conjugate_over_all_choices_of_tokens():
    from itertools import combinations

    gamma, keep, share = 0.4, 2, 1.5
    a, score = torch.randn(5, generator=torch.Generator().manual_seed(1)).double(), scores(5, 1)
    value, plan = semi_dual(a, score, torch.tensor([share]).double(), keep, gamma)
    best = -np.inf
    for pair in combinations(range(5), keep):
        s = (a + score[:, 0])[list(pair)].numpy()
        for first in np.linspace(0, share, 2001):
            t = np.array([first, share - first])
            best = max(best, t @ s - gamma / 2 * t @ t)
    assert float(a.sum() - value) == pytest.approx(best, abs=1e-5)
    torch.testing.assert_close(plan.sum(), torch.tensor(share).double())


@pytest.mark.parametrize("keep", [2, 5, 12])
def test_the_plans_are_the_gradients_of_the_duals(keep):
    score, a, b = scores(), scores(T, 1, 3)[:, 0], scores(E, 1, 4)[:, 0]
    a.requires_grad_(), b.requires_grad_()
    for value, plan, of in (
        (*semi_dual(a, score, mass(), keep, 0.3), (a,)),
        (*dual(a, b, score, mass(), keep, 0.3), (a, b)),
    ):
        gradients = torch.autograd.grad(value, of)
        torch.testing.assert_close(gradients[0], 1 - plan.sum(1).detach())
        if len(of) == 2:
            torch.testing.assert_close(gradients[1], mass() - plan.sum(0).detach())


@pytest.mark.parametrize("top_k", [1, 2])
def test_an_expert_has_at_most_k_tokens_and_all_have_equal_mass(top_k):
    score = scores(40, 5, seed=2)
    # All tokens prefer expert 0: choosing by score alone would send 40 there.
    score[:, 0] += 1
    plan = sparse_ot(routing_of(score), RouteContext(), top_k=top_k)
    assert int(plan.load_E.max()) <= 8 * top_k
    assert int(plan.load_E.min()) > 0
    inside = transport(score, mass(40, 5), 8 * top_k, 0.1, form="semi_dual", solver="lbfgs", steps=50)
    torch.testing.assert_close(inside.sum(0), mass(40, 5))
    assert len(plan.token_A.unique()) >= 38, "nearly every token has an expert"


def test_only_the_weights_have_gradients_and_what_is_not_allowed_stays_out():
    torch.manual_seed(0)
    layer = MoE(8, 4, 5, "linear", "sparse_ot", shared=0)
    layer(torch.randn(20, 8)).square().sum().backward()
    assert layer.router.weight_ED.grad.abs().sum() > 0
    allowed = torch.rand(20, 5) > 0.4
    score = scores(20, 5).float()
    plan = sparse_ot(Routing(score, score, allowed_TE=allowed), RouteContext())
    assert allowed[plan.token_A, plan.expert_A].all()


def test_what_cannot_be_is_refused():
    for options in ({"form": "primal"}, {"solver": "sgd"}, {"gamma": 0.0}, {"steps": 0}):
        with pytest.raises(PumiceError, match=next(iter(options))):
            sparse_ot(routing_of(scores()), RouteContext(), **options)
