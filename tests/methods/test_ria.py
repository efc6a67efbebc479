"""RIA and symmetric Wanda are their formulas."""

import pytest
import torch
from torch import nn

from pumice.core import registry
from pumice.prune.axes import Axes
from pumice.prune.run import Pruner
from tests.methods.layers import correlated, draw, score, stats_of


def test_ria_weight_by_weight():
    x, w = correlated(), draw(6, 16)
    norm = x.double().norm(dim=0) / len(x) ** 0.5
    found = score("ria", w, stats_of(x))
    for o, i in ((0, 0), (3, 7), (5, 15)):
        size = w[o, i].abs()
        truth = (size / w[o].abs().sum() + size / w[:, i].abs().sum()) * norm[i] ** 0.5
        assert found[o, i] == pytest.approx(float(truth), rel=1e-4)


def test_ria_does_not_see_the_scale_of_outputs_alone():
    """Scaling a whole row changes Wanda's scores in proportion, RIA's only through the column sums."""
    w = draw(4, 16)
    stats = {"input_sqnorm": torch.ones(16)}
    bigger = w.clone()
    bigger[0] *= 1e3
    row = score("ria", bigger, stats, power=0.0)[0]
    assert row.max() <= w[0].abs().max() / w[0].abs().sum() + 1
    assert score("ria", w, stats, power=0.0).sum() == pytest.approx(4 + 16, rel=1e-4), "each row and column adds one"


def test_ria_of_dead_channels_is_finite():
    w = draw(4, 8)
    w[1], w[:, 3] = 0, 0
    found = score("ria", w, {"input_sqnorm": torch.zeros(8)})
    assert torch.isfinite(found).all()
    assert not found[1].any()


def test_symmetric_wanda_weight_by_weight():
    x, w = correlated(), draw(6, 16)
    stats = {**stats_of(x), "output": x @ w.t()}
    rms = lambda v: float(v.double().square().mean().sqrt())  # noqa: E731
    found = score("symmetric-wanda", w, stats, share=0.5)
    for o, i in ((0, 0), (3, 7), (5, 15)):
        truth = abs(float(w[o, i])) * (rms(x[:, i]) + 0.5 * rms(x @ w[o]))
        assert found[o, i] == pytest.approx(truth, rel=1e-4)
    assert torch.equal(score("symmetric-wanda", w, stats, share=0.0), score("wanda", w, stats))


def test_symmetric_wanda_measures_what_one_weight_adds():
    """Removing one weight changes ‖X ΔWᵀ‖ + ‖ΔWᵀ Yᵀ‖ by the score, up to the number of tokens."""
    x, w = correlated(tokens=50), draw(5, 16)
    y = x @ w.t()
    found = score("symmetric-wanda", w, {**stats_of(x), "output": y})
    delta = torch.zeros_like(w)
    delta[2, 9] = -w[2, 9]
    rise = (x @ delta.t()).norm() + (y @ delta).norm()
    assert rise / 50**0.5 == pytest.approx(float(found[2, 9]), rel=1e-4)


def test_the_output_of_a_grouped_convolution_is_taken_group_by_group():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 6, 1, groups=2, bias=False))
    x = draw(4, 8, 3, 3)
    axes = Axes.make("symmetric-wanda", density=0.5)
    w = model[0].weight.detach().clone().flatten(1)
    Pruner(model, axes, [x], loss=lambda m, b: m(b).sum(), progress=False).run()
    inputs = x.movedim(1, -1).flatten(0, 2)
    truth = torch.empty_like(w)
    for group in range(2):
        own, rows = inputs[:, group * 4 : group * 4 + 4], slice(group * 3, group * 3 + 3)
        truth[rows] = score("symmetric-wanda", w[rows], {**stats_of(own), "output": own @ w[rows].t()})
    kept = truth >= truth.flatten().topk(12).values[-1]
    assert torch.equal(model[0].weight.flatten(1) != 0, kept)


def test_they_compare_over_the_layer():
    assert registry.scorer.get("ria").extras["scope"] == "layer"
    assert registry.scorer.get("symmetric-wanda").extras["scope"] == "layer"
