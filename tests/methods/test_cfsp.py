"""CFSP's coarse stage: angles and densities from blocks whose turns are known."""

import math

import pytest
import torch
from torch import nn

from pumice.prune.allocate.base import Block
from pumice.prune.allocate.cfsp import angle
from pumice.prune.axes import Axes
from pumice.prune.run import Pruner
from tests import tiny
from tests.methods.test_allocations import allocate, kept, mean, mlp


def test_the_angle_is_a_share_of_a_half_turn():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [2.0, 2.0]])
    y = torch.tensor([[5.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 0.0]])
    assert angle(x, y).tolist() == pytest.approx([0, 0.5, 1, 0.25])


def turns(*angles):
    """A walk over blocks that turn their input by these shares of π."""

    def walk(visit):
        for index, share in enumerate(angles):
            x = torch.tensor([[1.0, 0.0]] * 3)
            y = torch.tensor([[math.cos(math.pi * share), math.sin(math.pi * share)]] * 3)
            visit(Block(f"{index}.weight", lambda: iter(()), lambda x=x, y=y: iter([(x, y), (x, y)])))

    return walk


@pytest.mark.parametrize("sharpness", [1.0, 8.0, 0.0])
def test_densities_follow_the_sigmoid_of_the_importance(sharpness):
    model = mlp(1, 1, 1)
    found = allocate("cfsp", model, 0.4, more={"walk": turns(0.1, 0.3, 0.5)}, sharpness=sharpness)
    raw = [1 / (1 + math.exp(-sharpness * (share - 0.3))) for share in (0.1, 0.3, 0.5)]
    truth = [0.4 * 3 * value / sum(raw) for value in raw]
    assert list(found.values()) == pytest.approx(truth, abs=1 / 400)
    assert sum(kept(model, found).values()) == 480


def test_the_default_is_the_scale_of_the_authors_program():
    """It adds up the angles over 128 windows of 1024 tokens and divides by 10⁴."""
    found = allocate("cfsp", mlp(1, 1, 1), 0.4, more={"walk": turns(0.1, 0.12, 0.14)})
    raw = [1 / (1 + math.exp(-128 * 1024 * (share - 0.12) / 1e4)) for share in (0.1, 0.12, 0.14)]
    assert list(found.values()) == pytest.approx([0.4 * 3 * value / sum(raw) for value in raw], abs=1 / 400)


def test_a_density_above_one_is_capped_and_the_budget_kept():
    model = mlp(1, 1, 1)
    found = allocate("cfsp", model, 0.8, more={"walk": turns(0.0, 0.5, 1.0)}, sharpness=10.0)
    assert found["2.weight"] == 1.0
    assert mean(model, found) == pytest.approx(0.8)


class Residual(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.inner = nn.Linear(16, 16)
        with torch.no_grad():
            self.inner.weight.mul_(scale)

    def forward(self, x):
        return x + self.inner(x)


def test_real_blocks_that_change_more_keep_more():
    torch.manual_seed(0)
    model = nn.Sequential(Residual(0.1), Residual(10.0), Residual(1.0), nn.Linear(16, 4))
    axes = Axes.make("magnitude", allocation={"name": "cfsp", "sharpness": 5.0}, density=0.5)
    result = Pruner(model, axes, [torch.randn(40, 16)], progress=False).run()
    small, large, middle, head = (layer.asked for layer in result.layers)
    assert small < middle < large
    assert min(small, middle) < head < large


def test_padding_does_not_count():
    """Tokens behind the mask must not change the importance."""
    asked = []
    for fill in (5, 60):
        model = tiny.llama()
        ids = torch.randint(4, 100, (2, 12), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[:, 9:] = 0
        ids[:, 9:] = fill
        axes = Axes.make("magnitude", allocation={"name": "cfsp", "sharpness": 20.0}, density=0.5)
        result = Pruner(model, axes, [{"input_ids": ids, "attention_mask": mask}], progress=False).run()
        asked.append([layer.asked for layer in result.layers])
    assert asked[0] == asked[1]
    assert len(set(asked[0])) > 1
