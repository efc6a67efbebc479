"""CHITA: its objective is the paper's, the solution on a support is exact, the error never grows, and H is not formed."""

from itertools import combinations, pairwise

import pytest
import torch

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.prune.recover.chita import Problem, ridges, solve
from tests.methods.layers import draw, recover


def problem(o=3, i=6, n=5, seed=0, first=1.0, damp=0.1):
    mix = draw(i, i, seed=seed + 7)
    gradients, dense = draw(o, n, i, seed=seed) @ mix, draw(o, i, seed=seed + 1)
    return Problem.make([gradients], [dense], ridges([gradients], damp, 0.5), first)


def matrix(p):
    """A [N, weights] as the paper has it."""
    return p.gradients[0].movedim(1, 0).flatten(1).double()


def ridge(p):
    return p.ridge[0].flatten().double()


def objective(p, w):
    """½‖y − Aw‖² + ½Σ Nλ(w − w̄)² with y = Aw̄ − e."""
    a, dense = matrix(p), p.dense[0].flatten().double()
    y = a @ dense - p.offset_N
    return float((y - a @ w).square().sum() + (ridge(p) * (w - dense).square()).sum()) / 2


def exact(p, kept):
    """The minimum on a support by the normal equations with the Hessian that CHITA avoids."""
    a, dense = matrix(p), p.dense[0].flatten().double()
    index = kept.flatten().nonzero().flatten()
    h = a[:, index].t() @ a[:, index] + torch.diag(ridge(p)[index])
    w = torch.zeros_like(dense)
    w[index] = torch.linalg.solve(h, a[:, index].t() @ (a @ dense - p.offset_N) + ridge(p)[index] * dense[index])
    return w


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_objective_gradient_and_solution_are_the_papers(first):
    p = problem(first=first)
    w = draw(3, 6, seed=9)
    assert p.error([w]) == pytest.approx(objective(p, w.flatten().double()), rel=1e-5)
    free = w.clone().requires_grad_()
    ((matrix(p).float() @ (free - p.dense[0]).flatten() + first).square().sum() / 2).backward()
    torch.testing.assert_close(p.slope([w])[0], free.grad + p.ridge[0] * (w - p.dense[0]), rtol=1e-4, atol=1e-4)
    kept = draw(3, 6, seed=4) > 0
    torch.testing.assert_close(p.best_on([kept])[0].flatten().double(), exact(p, kept), rtol=1e-3, atol=1e-4)


def test_the_quadratic_model_is_the_losses():
    """For a linear model with squared loss the Gauss-Newton term and e turn up by themselves: A(w−w̄) + e·N/N."""
    p = problem(first=1.0)
    dense = p.dense[0].flatten().double()
    n = len(p.offset_N)
    slope = p.slope(p.dense)[0].flatten().double()
    assert torch.allclose(slope, matrix(p).sum(0), rtol=1e-4), "N times the gradient of the mean loss"
    step = draw(len(dense)).double() * 1e-3
    rise = objective(p, dense + step) - objective(p, dense)
    fisher = matrix(p).t() @ matrix(p) / n + torch.diag(ridge(p)) / n
    assert rise / n == pytest.approx(float(step @ matrix(p).mean(0) + step @ fisher @ step / 2), rel=1e-6)


def test_the_error_never_grows():
    for seed in range(5):
        p = problem(8, 20, 12, seed)
        errors = []
        for iterations in range(8):
            w, masks = solve(
                p.gradients,
                p.dense,
                lambda ws: [select.layer(ws[0].square(), 0.3)],
                ridge=p.ridge,
                first=1.0,
                iterations=iterations,
            )
            assert int(masks[0].sum()) == 48
            assert not w[0][~masks[0]].any()
            errors.append(p.error(w))
        assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
        assert errors[-1] < errors[0], "more than the magnitude mask solved exactly"


def test_near_the_best_of_all_supports():
    ratios, starts = [], []
    for seed in range(8):
        p = problem(1, 10, 6, seed, first=0.0)
        masks = (torch.tensor([[i in keep for i in range(10)]]) for keep in combinations(range(10), 5))
        best = min(objective(p, exact(p, mask)) for mask in masks)
        project = lambda ws: [select.layer(ws[0].square(), 0.5)]  # noqa: E731
        w, _ = solve(p.gradients, p.dense, project, ridge=p.ridge)
        start, _ = solve(p.gradients, p.dense, project, ridge=p.ridge, iterations=0)
        ratios.append(p.error(w) / best)
        starts.append(p.error(start) / best)
    assert min(ratios) > 0.999
    assert sum(ratios) < 0.97 * sum(starts)
    assert sum(ratios) / len(ratios) < 1.2


def test_layers_that_are_pruned_together_share_one_residual():
    p = problem(4, 6, 5)
    halves = [g.contiguous() for g in p.gradients[0].split(2)]
    whole, mask = solve(p.gradients, p.dense, lambda ws: [select.layer(ws[0].square(), 0.5)], ridge=p.ridge)

    def project(ws):
        return list(select.layer(torch.cat(ws).square(), 0.5).split(2))

    parts, masks = solve(halves, list(p.dense[0].split(2)), project, ridge=list(p.ridge[0].split(2)))
    assert torch.equal(torch.cat(masks), mask[0])
    torch.testing.assert_close(torch.cat(parts), whole[0], rtol=1e-3, atol=1e-5)


def test_a_million_weights_without_their_hessian():
    """H would take 4 TB."""
    stats = {"gradients": draw(1000, 2, 1000)}
    new, mask, _ = recover("chita", draw(1000, 1000, seed=1), stats, None, "unstructured:layer", 0.1, iterations=2)
    assert int(mask.sum()) == 100_000
    assert torch.isfinite(new).all()


@pytest.mark.parametrize("pattern", ["unstructured:row", "2:4", "4x4", "column"])
def test_beside_another_score_only_the_kept_weights_move(pattern):
    w, stats = draw(8, 16), {"gradients": draw(8, 6, 16, seed=3), "input_sqnorm": torch.ones(16)}
    new, mask, _ = recover("chita", w, stats, "wanda", pattern)
    assert torch.equal(mask, recover("none", w, stats, "wanda", pattern)[1])
    p = Problem.make([stats["gradients"]], [w], ridges([stats["gradients"]], 0.001, 3.0), 0.0)
    assert p.error([new]) < p.error([w * mask])
    own, legal, _ = recover("chita", w, stats, None, pattern)
    start, _, _ = recover("chita", w, stats, None, pattern, iterations=0)
    assert p.error([own]) <= p.error([start]) * (1 + 1e-6)
    assert torch.equal(own != 0, legal)


def test_without_damping_it_is_refused():
    with pytest.raises(PumiceError, match="damp=0"):
        recover("chita", draw(4, 4), {"gradients": draw(4, 2, 4)}, None, damp=0.0)
