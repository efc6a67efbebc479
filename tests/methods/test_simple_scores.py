"""Magnitude, random, Wanda, Taylor and Fisher are their formulas."""

import torch
from torch import nn

from pumice.core import registry
from pumice.core.gradients import model_stats
from pumice.core.view import find_views
from pumice.prune.axes import Axes
from pumice.prune.run import Pruner, random_scores
from tests.methods.layers import correlated, draw, score, stats_of


def test_magnitude():
    w = draw(6, 8)
    assert torch.equal(score("magnitude", w, {}), w.abs())
    assert registry.scorer.get("magnitude").needs == ()


def test_random_depends_on_seed_and_name_only():
    one = random_scores((4, 6), 0, "a")
    assert torch.equal(one, random_scores((4, 6), 0, "a"))
    assert not torch.equal(one, random_scores((4, 6), 1, "a"))
    assert not torch.equal(one, random_scores((4, 6), 0, "b"))
    assert torch.equal(score("random", draw(4, 6), {"random": one}), one)


def random_masks(seed, weight_seed=0):
    torch.manual_seed(weight_seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    Pruner(model, Axes.make("random", density=0.5), seed=seed, progress=False).run()
    return torch.stack([model[0].weight, model[1].weight]) != 0


def test_random_pruning_ignores_the_weights():
    assert torch.equal(random_masks(0), random_masks(0, weight_seed=9))
    assert not torch.equal(random_masks(0), random_masks(1))
    assert not torch.equal(*random_masks(0))


def test_wanda_is_weight_times_norm_of_the_input_within_each_row():
    x, w = correlated(), draw(6, 16)
    truth = w.abs() * (x.norm(dim=0) / len(x) ** 0.5)
    assert torch.allclose(score("wanda", w, stats_of(x)), truth, rtol=1e-5)
    assert registry.scorer.get("wanda").extras["scope"] == "row"
    model = nn.Linear(16, 6)
    model.weight.data.copy_(w)
    Pruner(model, Axes.make("wanda", density=0.25), [x], progress=False).run()
    for row, scores in zip(model.weight, truth, strict=True):
        best = scores.topk(4).indices.sort().values
        assert row.nonzero().flatten().tolist() == best.tolist()
        assert torch.equal(row[best], w[model.weight.eq(row).all(1).nonzero().item()][best])


def test_wanda_on_white_inputs_is_magnitude():
    x = torch.linalg.qr(draw(64, 16))[0] * 8
    w = draw(6, 16)
    assert torch.allclose(score("wanda", w, stats_of(x)), w.abs(), rtol=1e-4)


def test_taylor_is_weight_times_gradient():
    w, g = draw(4, 6), draw(4, 6, seed=1)
    assert torch.equal(score("taylor", w, {"gradient": g}), (w * g).abs())


def test_taylor_and_fisher_against_autograd():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    batches = [draw(6, 5, seed=s) for s in range(4)]
    views = find_views(model)
    found = model_stats(model, views, batches, frozenset({"gradient", "fisher_diag"}), lambda m, b: m(b).pow(2).mean())
    for view in views:
        grads = []
        for batch in batches:
            loss = model(batch).pow(2).mean()
            grads.append(torch.autograd.grad(loss, view.tensor)[0])
        w = view.read()
        g = torch.stack(grads)
        assert torch.allclose(score("taylor", w, found[view.name]), (w * g.mean(0)).abs(), atol=1e-7)
        assert torch.allclose(score("fisher", w, found[view.name]), w**2 * g.square().mean(0) / 2, atol=1e-9)


def test_taylor_predicts_what_removing_a_weight_does():
    """To first order the loss changes by w·g when a (small) weight becomes zero."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    model.weight.data *= 1e-3
    x = draw(20, 5)
    view = find_views(model)[0]
    loss = lambda m, b: (m(b) - 1).pow(2).mean()  # noqa: E731
    stats = model_stats(model, [view], [x], frozenset({"gradient"}), loss)["weight"]
    predicted = score("taylor", view.read(), stats)
    with torch.no_grad():
        base = loss(model, x)
        for o in range(3):
            for i in range(5):
                keep = model.weight[o, i].item()
                model.weight[o, i] = 0
                assert abs(abs(loss(model, x) - base) - predicted[o, i]) < 2e-6
                model.weight[o, i] = keep
