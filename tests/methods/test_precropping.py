"""Precropping: SynFlow's conservation law, the square-root rule, tied widths, and that the result trains."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pumice.core.errors import PumiceError
from pumice.core.view import find_views
from pumice.engine.shrink import shrink_result
from pumice.prune.shrink.precropping import _flow, synflow_densities
from tests import tiny
from tests.test_trace import cnn

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(16) % 10
PAIRS = [{"input": IMAGES, "labels": LABELS}]


def plain(channels=32):
    """Three convolutions of one width, no biases or norms."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, channels, 3, bias=False), nn.ReLU(), nn.Conv2d(channels, channels, 3, bias=False), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10, bias=False)]
    return nn.Sequential(*layers, nn.Conv2d(channels, channels, 3, bias=False), nn.ReLU(), *head)


def test_synaptic_flow_is_conserved_from_layer_to_layer():
    """Without biases, the saliency of every layer sums to the same R (the paper's theorem)."""
    model = plain().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    scores = _flow(model, find_views(model), torch.ones(1, 3, 8, 8, dtype=torch.float64))
    totals = torch.stack([score.sum() for score in scores.values()])
    torch.testing.assert_close(totals, totals[:1].expand(4))


def test_synflow_keeps_the_density_and_no_layer_dies():
    model = plain()
    views = find_views(model)
    density = synflow_densities(model, views, IMAGES, 0.05, 50)
    kept = sum(density[view.name] * view.numel for view in views) / sum(view.numel for view in views)
    assert kept == pytest.approx(0.05, abs=1e-3)
    assert min(density.values()) > 0
    assert density["0.weight"] > density["2.weight"], "the small first layer carries as much flow as the wide ones"


def test_widths_follow_the_square_root_of_the_densities():
    model = plain()
    density = synflow_densities(copy.deepcopy(model), find_views(model), IMAGES, 0.3, 100)
    result = shrink_result(model, "precropping", density=0.3, data=IMAGES)
    widths = [model[0].out_channels, model[2].out_channels, model[4].out_channels]
    roots = [density[f"{index}.weight"] ** 0.5 for index in (0, 2, 4)]
    ratio = widths[1] / roots[1]
    for width, root in zip(widths, roots, strict=True):
        assert width == pytest.approx(min(32, ratio * root), abs=1.5)
    assert 0.25 < result.density <= 0.3


@pytest.mark.parametrize("source", ["synflow", "snip"])
def test_tied_channels_get_one_width_and_the_result_trains(source):
    model = cnn()
    loss = lambda m, b: F.cross_entropy(m(b["input"]), b["labels"])  # noqa: E731
    result = shrink_result(
        model, {"name": "precropping", "source": source, "rounds": 10}, density=0.5, data=PAIRS, loss=loss
    )
    assert result.density <= 0.5
    assert model[3].c2.out_channels == model[0].out_channels == model[4].depth.groups
    assert any("train it" in note for note in result.notes)
    before = F.cross_entropy(model.train()(IMAGES), LABELS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
    assert F.cross_entropy(model(IMAGES), LABELS) < before


def test_the_seed_decides_the_new_weights():
    first, second, third = plain(), plain(), plain()
    for model, seed in ((first, 0), (second, 0), (third, 1)):
        shrink_result(model, {"name": "precropping", "rounds": 5}, density=0.5, data=IMAGES, seed=seed)
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, third[0].weight)


@pytest.mark.parametrize(
    ("build", "method", "data", "reason"),
    [
        (plain, {"name": "precropping", "source": "grasp"}, IMAGES, "synflow, snip"),
        (plain, {"name": "precropping", "rounds": 0}, IMAGES, "at least 1"),
        (plain, {"name": "precropping", "source": "snip"}, IMAGES, "need a loss"),
        (tiny.llama, "precropping", torch.arange(4, 12)[None], "no convolutions"),
    ],
    ids=str,
)
def test_bad_requests(build, method, data, reason):
    with pytest.raises(PumiceError, match=reason):
        shrink_result(build(), method, density=0.5, data=data)
