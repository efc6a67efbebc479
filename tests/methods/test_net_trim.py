"""Net-Trim: its solution fulfils the optimality conditions, finds planted sparse layers, and keeps ReLU responses."""

import pytest
import torch
from torch import nn

from pumice.core.errors import PumiceError
from pumice.prune.axes import Axes
from pumice.prune.recover.net_trim import _Linear, _Rectified, _sparsest
from pumice.prune.run import Pruner
from tests.methods.layers import correlated, draw, error, recover, stats_of


def given(x, w, bias=None):
    return {**stats_of(x), "input": x, "bias": torch.zeros(len(w)) if bias is None else bias}


def solve(responses, w, eps, iterations=3000, monkeypatch=None):
    monkeypatch.setattr("pumice.prune.recover.net_trim.LEAST", eps)
    monkeypatch.setattr("pumice.prune.recover.net_trim.MOST", eps)
    return _sparsest(w, responses, 0.5, 1, iterations)[0]


def test_linear_solution_fulfils_the_optimality_conditions(monkeypatch):
    """At the minimum of ‖U‖₁ on ‖U−W‖_H ≤ ε: ε is used up, and H(W−U) is μ·sign(U) where U is not zero, ≤ μ elsewhere."""
    x, w = correlated(width=12), draw(5, 12)
    linear = _Linear(w, stats_of(x)["hessian"])
    u = solve(linear, w, 0.3, monkeypatch=monkeypatch)
    assert 0.2 < float((u == 0).float().mean()) < 0.9
    assert linear._norm(u - w) == pytest.approx(0.3 * linear._norm(w), rel=1e-3)
    pull = (w - u) @ linear.h
    mu = pull.abs().max()
    on = u != 0
    torch.testing.assert_close(pull[on], mu * u[on].sign(), rtol=0.02, atol=0.0)


def test_rectified_solution_is_feasible_and_no_larger_than_the_linear_one(monkeypatch):
    """Leaving the silent responses free below zero can only make ‖U‖₁ smaller."""
    x, w, bias = correlated(tokens=60, width=12), draw(5, 12), draw(5, seed=8)
    rectified = _Rectified(w, x, bias)
    u = solve(rectified, w, 0.1, monkeypatch=monkeypatch)
    before, after = x @ w.t() + bias, x @ u.t() + bias
    on = before > 0
    assert (after - before)[on].norm() <= 0.101 * (before - bias)[on].norm()
    assert after[~on].max() < 0.02 * before.abs().max()
    tight = solve(_Linear(w, stats_of(x)["hessian"]), w, 0.001, monkeypatch=monkeypatch)
    assert u.abs().sum() < tight.abs().sum()


def test_finds_a_planted_sparse_layer_from_few_samples(monkeypatch):
    """60 inputs with 5 weights per output, hidden under a dense part that the 45 samples cannot see."""
    x = draw(45, 60)
    planted = torch.zeros(4, 60)
    for row in range(4):
        at = torch.randperm(60, generator=torch.Generator().manual_seed(row))[:5]
        planted[row, at] = draw(5, seed=row).sign() * (1 + draw(5, seed=row + 9).abs())
    null = torch.linalg.svd(x.double())[2][45:].float()
    w = planted + 3 * draw(4, 15, seed=3) @ null
    assert torch.allclose(x @ w.t(), x @ planted.t(), atol=1e-3)
    found = solve(_Linear(w, stats_of(x)["hessian"]), w, 1e-4, monkeypatch=monkeypatch)
    assert torch.equal(found != 0, planted != 0)
    torch.testing.assert_close(found, planted, rtol=1e-2, atol=1e-2)
    assert not torch.equal(recover("none", w, {}, "magnitude", "unstructured:layer", 5 / 60)[1], planted != 0)


@pytest.mark.parametrize("pattern", ["unstructured:row", "unstructured:layer", "2:4", "4x4"])
def test_better_than_magnitude_with_the_density_hit(pattern):
    ratios = []
    for seed in range(4):
        x, w = correlated(width=32, seed=seed), draw(16, 32, seed=seed)
        new, mask, _ = recover("net-trim", w, given(x, w), None, pattern)
        plain, other, _ = recover("none", w, {}, "magnitude", pattern)
        assert int(mask.sum()) == int(other.sum())
        assert torch.equal(new != 0, mask)
        ratios.append(float(error(x, w, new).sum() / error(x, w, plain).sum()))
    assert max(ratios) < 0.7


def test_the_refit_behind_a_relu_beats_the_linear_one_in_what_the_relu_gives():
    x, w = correlated(width=16, tokens=300), draw(12, 16)
    bias = -0.5 * (x @ w.t()).std(0)
    truth = (x @ w.t() + bias).relu()

    def off(new):
        return float(((x @ new.t() + bias).relu() - truth).square().sum())

    linear, mask, _ = recover("net-trim", w, given(x, w, bias), "magnitude", density=0.4)
    masked = w * mask
    rectified, same, _ = recover("net-trim", w, given(x, w, bias), "magnitude", density=0.4, relu=True)
    assert torch.equal(mask, same)
    assert off(rectified) < off(linear) < off(masked)
    whole, _, _ = recover("net-trim", w, given(x, w, bias), None, density=0.4, relu=True)
    assert off(whole) < off(linear)


def test_the_bias_of_the_layer_reaches_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    model[0].bias.data.fill_(-0.7)
    x, w = correlated(), model[0].weight.detach().clone()
    axes = Axes.make("magnitude", recover={"name": "net-trim", "relu": True}, density=0.5, targets="0")
    Pruner(model, axes, [x], progress=False).run()
    stats = given(x[:: max(1, len(x) // 512)][:512], w, model[0].bias.detach())
    truth, _, _ = recover("net-trim", w, stats, None, "unstructured:layer", relu=True)
    other, _, _ = recover("net-trim", w, {**stats, "bias": torch.zeros(12)}, None, "unstructured:layer", relu=True)
    assert torch.allclose(model[0].weight, truth, atol=1e-5)
    assert not torch.allclose(truth, other, atol=1e-2)


def test_bad_options():
    x, w = correlated(), draw(4, 16)
    with pytest.raises(PumiceError, match="bisections=0"):
        recover("net-trim", w, given(x, w), None, bisections=0)
