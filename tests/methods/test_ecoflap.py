"""ECoFLaP: the zeroth-order score of a quadratic loss is known, and the shares of the budget with it."""

import pytest
import torch
from torch import nn

from pumice.core.errors import PumiceError
from pumice.core.view import find_views
from pumice.prune.allocate.base import changed, noise, share, whole
from pumice.prune.axes import Axes
from pumice.prune.run import Pruner
from tests import tiny
from tests.methods.test_allocations import allocate, kept, mlp

TOKENS = torch.randint(4, 100, (2, 20), generator=torch.Generator().manual_seed(0))


def quadratic(model, slopes):
    """L = Σ slope·Σw² + Σw: its central difference along z is exactly zᵀ∇L."""

    def loss(batches, *, exact=False):
        del batches
        assert exact
        total = 0.0
        for layer, slope in zip(model, slopes, strict=True):
            w = layer.weight.detach().double()
            total += float(slope * w.square().sum() + w.sum())
        return total

    return loss


def test_the_score_is_the_gradient_along_the_direction():
    model, slopes = mlp(1, 1, 1), (1.0, 3.0, 0.2)
    views = find_views(model)
    options = {"eps": 0.01, "draws": 3, "slack": 0.25, "group": "layer"}
    found = allocate("ecoflap", model, 0.5, more={"loss": quadratic(model, slopes)}, **options)
    scores = []
    for view, layer, slope in zip(views, model, slopes, strict=True):
        gradient = 2 * slope * layer.weight.detach().double() + 1
        scores.append(sum(abs(float((noise(view, 0, draw) * gradient).sum())) for draw in range(3)) / 3)
    rest = 600 - 0.25 * 1200
    truth = [100 + rest * score / sum(scores) for score in scores]
    assert max(truth) < 400
    assert [kept(model, found)[view.name] for view in views] == pytest.approx(truth, abs=1)


def test_a_blocks_score_is_the_sum_over_its_layers_each_moved_alone():
    model, slopes = mlp(1, 1, 1, 1), (1.0, 3.0, 0.2, 2.0)
    views = find_views(model)
    blocks = {view.name: "ab"[index // 2] for index, view in enumerate(views)}
    options = {"eps": 0.01, "draws": 2, "slack": 0.25}
    found = allocate("ecoflap", model, 0.5, blocks=blocks, more={"loss": quadratic(model, slopes)}, **options)
    scores = dict.fromkeys("ab", 0.0)
    for view, layer, slope in zip(views, model, slopes, strict=True):
        gradient = 2 * slope * layer.weight.detach().double() + 1
        scores[blocks[view.name]] += sum(abs(float((noise(view, 0, draw) * gradient).sum())) for draw in range(2))
    for view in views:
        truth = 100 + 400 * scores[blocks[view.name]] / sum(scores.values()) * (800 - 400) / 400 / 2
        assert kept(model, found)[view.name] == pytest.approx(truth, abs=1)


def test_the_counts_sum_to_the_budget_and_full_layers_pass_on_what_they_cannot_take():
    model = mlp(1, 1, 1)
    for density in (0.3, 0.61, 0.95):
        found = allocate("ecoflap", model, density, more={"loss": quadratic(model, (1e4, 1.0, 1.0))}, group="layer")
        counts = kept(model, found)
        assert sum(counts.values()) == round(1200 * density)
        assert min(counts.values()) >= int(400 * (density - 0.1))
    assert counts["0.weight"] == 400


def test_the_model_is_left_bit_by_bit_as_it_was():
    model = mlp(1, 1).to(torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    with changed(find_views(model), lambda view, w: w + 0.1 * noise(view, 0, 0)):
        assert not torch.equal(model[0].weight, before[0])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ZeroDivisionError), changed(find_views(model), lambda view, w: w * 0):
        raise ZeroDivisionError
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_on_a_real_model_no_gradient_is_kept_and_the_seed_decides():
    asked = []
    for seed in (0, 0, 1):
        model = tiny.llama()
        axes = Axes.make("magnitude", allocation="ecoflap", density=0.5)
        result = Pruner(model, axes, [{"input_ids": TOKENS}], seed=seed, progress=False).run()
        asked.append([layer.asked for layer in result.layers])
        assert all(p.grad is None for p in model.parameters())
        assert result.density == pytest.approx(0.5, abs=0.03)
    assert asked[0] == asked[1] != asked[2]
    assert len(set(asked[0])) > 1


def test_a_model_without_a_loss_is_refused_before_it_is_touched():
    model = nn.Sequential(nn.Linear(8, 8))
    axes = Axes.make("magnitude", allocation="ecoflap", density=0.5)
    before = model[0].weight.detach().clone()
    with pytest.raises(PumiceError, match="loss"):
        Pruner(model, axes, [torch.randn(4, 8)], progress=False).run()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("options", [{"eps": 0.0}, {"draws": 0}, {"group": "head"}, {"slack": -0.1}])
def test_options_out_of_range_are_named(options):
    with pytest.raises(PumiceError, match=next(iter(options))):
        allocate("ecoflap", mlp(1), 0.5, **options)


def test_shares_clip_and_pass_on():
    found = share({"a": 3.0, "b": 1.0, "c": 0.0}, {"a": 10, "b": 100, "c": 100}, 50)
    assert found == pytest.approx({"a": 10, "b": 40, "c": 0})
    found = share({"a": 3.0, "b": 1.0, "c": 0.0}, {"a": 10, "b": 20, "c": 100}, 50)
    assert found == pytest.approx({"a": 10, "b": 20, "c": 20})
    with pytest.raises(PumiceError, match="cannot share"):
        share({"a": 1.0}, {"a": 10}, 11)


def test_whole_numbers_keep_the_sum_and_one_for_each():
    assert whole({"a": 1.5, "b": 1.5, "c": 0.0}, {"a": 9, "b": 9, "c": 9}, 4) == {"a": 2, "b": 1, "c": 1}
    assert whole({"a": 8.6, "b": 0.4}, {"a": 9, "b": 9}, 9) == {"a": 8, "b": 1}
    with pytest.raises(PumiceError, match="at least one"):
        whole({"a": 1.0, "b": 0.0}, {"a": 9, "b": 9}, 1)
