"""Allocations: each gives its paper's densities, and together they keep what was asked."""

import math

import pytest
import torch
from torch import nn

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.core.view import find_views
from pumice.prune.allocate.base import Layers
from pumice.prune.axes import Axes
from pumice.prune.run import Pruner
from tests.methods.layers import correlated, draw


def allocate(name, model, density, stats=None, blocks=None, score=None, more=None, **options):
    """Densities by view name; without blocks every layer is one. `more`: other fields of `Layers`."""
    views = find_views(model, ignore=())
    stats = stats or {}
    layers = Layers(
        views,
        blocks or {view.name: view.name for view in views},
        lambda: ((view, view.read(), stats.get(view.name, {})) for view in views),
        score or (lambda w, stats: w.abs()),
        **(more or {}),
    )
    return registry.allocation.get(name).bind(options)(layers, density)


def mlp(*scales, width=20, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in scales))
    with torch.no_grad():
        for layer, scale in zip(model, scales, strict=True):
            layer.weight.mul_(scale)
    return model


def kept(model, densities):
    """Weights that every layer keeps."""
    return {view.name: round(densities[view.name] * view.numel) for view in find_views(model, ignore=())}


def mean(model, densities):
    views = find_views(model, ignore=())
    return sum(densities[v.name] * v.numel for v in views) / sum(v.numel for v in views)


def test_uniform():
    assert set(allocate("uniform", mlp(1, 2, 3), 0.3).values()) == {0.3}


@pytest.mark.parametrize("density", [0.5, 0.1, 0.73])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_is_one_sort_over_everything(density, dtype):
    model = mlp(1.0, 0.98, 1.02).to(dtype)
    every = torch.cat([view.read().abs().flatten() for view in find_views(model)])
    best = every.sort(descending=True, stable=True).indices[: math.ceil(round(len(every) * density, 6))]
    chosen = torch.zeros(len(every), dtype=torch.bool)
    chosen[best] = True
    truth = dict(zip(("0.weight", "1.weight", "2.weight"), chosen.view(3, -1).sum(1).tolist(), strict=True))
    assert kept(model, allocate("global", model, density)) == truth
    Pruner(model, Axes.make("magnitude", density=density, allocation="global"), progress=False).run()
    assert torch.equal(torch.cat([layer.weight.flatten() for layer in model]) != 0, chosen)


def test_global_counts_are_exact_where_everything_ties():
    model = mlp(1, 1, 1)
    for layer in model:
        layer.weight.data.fill_(0.5)
    found = kept(model, allocate("global", model, 0.5))
    assert sum(found.values()) == 600
    assert found == {"0.weight": 400, "1.weight": 192, "2.weight": 8}, "earlier layers win, the guard holds the last"


def test_global_guard_holds_a_layer_that_would_be_emptied():
    model = mlp(1.0, 1e-6, 1.0)
    found = kept(model, allocate("global", model, 0.5, minimum=0.1))
    assert found["1.weight"] == 40
    assert sum(found.values()) == 600
    assert kept(model, allocate("global", model, 0.5, minimum=0.0))["1.weight"] == 1, "never quite empty"
    with pytest.raises(PumiceError, match=r"density=0\.1 leaves nothing"):
        allocate("global", model, 0.1, minimum=0.2)


def lamp_by_hand(w):
    """The score as the paper writes it: a weight's square over the sum of squares of all that are not smaller."""
    flat = w.double().flatten()
    squares = flat.square()
    return torch.stack([s / squares[squares >= s].sum() for s in squares])


def test_lamp_score():
    from pumice.prune.allocate.lamp import lamp_scores

    w = draw(5, 6)
    assert torch.allclose(lamp_scores(w, {}).flatten().double(), lamp_by_hand(w), rtol=1e-5)
    assert lamp_scores(w, {}).max() == 1
    ties = torch.tensor([[1.0, 1.0, 2.0]])
    assert sorted(lamp_scores(ties, {})[0].tolist()) == pytest.approx([1 / 6, 1 / 5, 1.0])
    assert torch.equal(lamp_scores(torch.zeros(2, 2), {}), torch.zeros(2, 2))


def test_lamp_on_two_layers_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    model[1].weight.data = torch.tensor([[0.1, 0.1], [0.1, 9.0]])
    # First layer: 16/16, 9/25, 4/29, 1/30; second: 1, and three below 0.001.
    assert kept(model, allocate("lamp", model, 0.25)) == {"0.weight": 1, "1.weight": 1}
    assert kept(model, allocate("lamp", model, 0.5)) == {"0.weight": 3, "1.weight": 1}
    assert kept(model, allocate("lamp", model, 5 / 8)) == {"0.weight": 4, "1.weight": 1}


def test_lamp_keeps_the_best_weight_of_every_layer():
    model = mlp(1.0, 1e-8, 1e4)
    densities = allocate("lamp", model, 0.01)
    assert all(count >= 1 for count in kept(model, densities).values())
    assert sum(kept(model, densities).values()) == 12
    before = [layer.weight.abs().flatten().argmax() for layer in model]
    Pruner(model, Axes.make("magnitude", density=0.01, allocation="lamp"), progress=False).run()
    assert all(layer.weight.flatten()[index] != 0 for layer, index in zip(model, before, strict=True))


def test_lamp_does_not_see_the_scale_of_a_layer():
    assert allocate("lamp", mlp(1, 1, 1), 0.3) == allocate("lamp", mlp(1, 1024, 1 / 64), 0.3)


class Shapes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 32, (3, 5))
        self.depth = nn.Conv1d(3, 3, 3, groups=3)
        self.fc = nn.Linear(64, 40)


def test_erdos_renyi_formulas():
    views = {view.name: view for view in find_views(Shapes())}
    er, erk = allocate("er", Shapes(), 0.2), allocate("erk", Shapes(), 0.2)
    raw = {
        "er": {"conv.weight": 38 / (32 * 6), "depth.weight": 4 / 3, "fc.weight": 104 / 2560},
        "erk": {"conv.weight": 46 / (32 * 6 * 15), "depth.weight": 7 / 9, "fc.weight": 104 / 2560},
    }
    for name, found in (("er", er), ("erk", erk)):
        free = [key for key in found if found[key] < 1]
        ratios = [found[key] / raw[name][key] for key in free]
        assert len(free) >= 2
        assert ratios == pytest.approx([ratios[0]] * len(free))
        assert all(raw[name][key] * ratios[0] >= 1 for key in found if found[key] == 1)
        total = sum(view.numel for view in views.values())
        assert sum(found[key] * views[key].numel for key in found) == pytest.approx(0.2 * total)
    assert er["depth.weight"] == 1
    assert erk["depth.weight"] == 1


@pytest.mark.parametrize("name", ["er", "erk"])
@pytest.mark.parametrize("density", [0.01, 0.3, 0.9, 1.0])
def test_erdos_renyi_keeps_the_budget(name, density):
    model = Shapes()
    found = allocate(name, model, density)
    assert all(0 < value <= 1 for value in found.values())
    assert mean(model, found) == pytest.approx(density)


def owl_case(outliers):
    """Blocks of |w| = 1 with so many weights of 100 planted in each."""
    model = mlp(*[1] * len(outliers))
    for layer, count in zip(model, outliers, strict=True):
        layer.weight.data.fill_(-1)
        layer.weight.data.view(-1)[:count] = 100
    return model, {f"{i}.weight": {"input_sqnorm": torch.ones(20)} for i in range(len(outliers))}


def test_owl_formula_on_planted_outliers():
    model, stats = owl_case([0, 4, 12])
    found = allocate("owl", model, 0.3, stats, lam=0.08, threshold=5.0)
    # Shares 0, 1 %, 3 % become 0, 2λ/3·1, 2λ; less their mean 2λ·4/9, plus 0.3.
    truth = [0.3 + 0.16 * (share - 4 / 9) for share in (0, 1 / 3, 1)]
    assert list(found.values()) == pytest.approx(truth)
    assert mean(model, found) == pytest.approx(0.3)
    assert allocate("owl", model, 0.3, stats, threshold=1e6) == {name: pytest.approx(0.3) for name in stats}


def test_owl_counts_the_outliers_of_a_block_together_and_weighs_by_the_input():
    model, stats = owl_case([0, 4, 0, 0])
    blocks = {"0.weight": "a", "1.weight": "a", "2.weight": "b", "3.weight": "b"}
    found = allocate("owl", model, 0.5, stats, blocks, lam=0.1)
    assert found["0.weight"] == found["1.weight"] == pytest.approx(0.6)
    assert found["2.weight"] == found["3.weight"] == pytest.approx(0.4)
    model, stats = owl_case([0, 0])
    stats["1.weight"] = {"input_sqnorm": torch.tensor([10000.0] + [1.0] * 19)}
    found = allocate("owl", model, 0.5, stats, lam=0.1)
    assert found["1.weight"] > found["0.weight"]


def test_owl_keeps_the_mean_where_blocks_differ_in_size():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 50), nn.Linear(50, 8), nn.Linear(8, 8))
    stats = {f"{i}.weight": {"input_sqnorm": torch.rand(m.in_features) ** 8} for i, m in enumerate(model)}
    found = allocate("owl", model, 0.4, stats, threshold=2.0)
    assert mean(model, found) == pytest.approx(0.4)
    assert len(set(found.values())) > 1


def test_owl_refuses_a_lambda_that_leaves_the_range():
    model, stats = owl_case([0, 12])
    with pytest.raises(PumiceError, match=r"lam=0\.5.*smaller lam"):
        allocate("owl", model, 0.3, stats, lam=0.5)


class Half(nn.Module):
    """Only one of its layers is ever used."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("allocation", ["owl", "global", "uniform", "er"])
def test_layers_without_tokens_get_the_plain_density(allocation):
    torch.manual_seed(0)
    model = Half()
    result = Pruner(model, Axes.make("wanda", density=0.5, allocation=allocation), [correlated()], progress=False).run()
    by_name = {layer.name: layer for layer in result.layers}
    assert by_name["spare.weight"].method == "magnitude"
    assert by_name["spare.weight"].density == pytest.approx(0.5, abs=0.04)
    assert any("spare" in note for note in result.notes)


def test_statistics_of_an_allocation_come_from_the_dense_model():
    """OWL before any pruning must give the same densities, whatever the pruning then does."""
    asked = []
    for recover in ("none", "obs"):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
        axes = Axes.make("wanda", recover=recover, density=0.5, allocation={"name": "owl", "threshold": 2.0})
        asked.append([layer.asked for layer in Pruner(model, axes, [correlated()], progress=False).run().layers])
    assert asked[0] == asked[1]
    assert len(set(asked[0])) > 1
