"""Channel permutation keeps more score, never less, near the best there is, and the layer computes the same product."""

from itertools import permutations

import pytest
import torch
from torch import nn

import pumice
from pumice.core.errors import PumiceError
from pumice.prune.layer import Selector
from pumice.prune.rewrite.permute import _assigned, _dealt, best_order, permute, retained
from pumice.weights.patterns.base import parse
from pumice.weights.wrapped import PermutedLinear
from tests.methods.layers import correlated, draw, score, stats_of

PATTERN = parse("2:4")


def clustered(seed=0, o=12, i=32):
    """Scores whose large columns lie beside each other, as those of real layers do."""
    return draw(o, i, seed=seed).abs() * torch.linspace(0.1, 3, i)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:4", "4:4"])
def test_more_is_kept_step_by_step(pattern):
    legal = parse(pattern)
    for seed in range(4):
        scores = clustered(seed)
        natural, dealt = retained(scores, legal), _dealt(scores, legal.m)
        found = best_order(scores, legal, 2)
        assert sorted(found.tolist()) == list(range(32))
        before = retained(scores[:, dealt], legal)
        order = dealt
        for place in range(legal.m):
            order = _assigned(scores, order, place, legal)
            after = retained(scores[:, order], legal)
            assert after >= before * (1 - 1e-6)
            before = after
        assert retained(scores[:, found], legal) >= max(before, natural) * (1 - 1e-6)
        if pattern != "4:4":
            assert before > natural


def test_an_assignment_is_the_best_of_all():
    """Brute force over the ways to put four columns into four groups."""
    scores = clustered(i=16)
    order = torch.arange(16)
    found = retained(scores[:, _assigned(scores, order, 1, PATTERN)], PATTERN)
    best = 0.0
    for way in permutations(range(4)):
        moved = order.view(4, 4).clone()
        moved[:, 1] = moved[list(way), 1]
        best = max(best, retained(scores[:, moved.flatten()], PATTERN))
    assert found == pytest.approx(best, rel=1e-6)


def test_the_natural_order_stays_where_it_is_the_best():
    scores = torch.tensor([[9.0, 9, 0, 0, 9, 9, 0, 0]])
    assert retained(scores[:, best_order(scores, PATTERN, 1)], PATTERN) == 36
    assert best_order(torch.ones(3, 8), PATTERN, 1).tolist() == list(range(8))


def test_the_layer_is_the_masked_weight_in_the_old_order():
    torch.manual_seed(0)
    module, x = nn.Linear(32, 12), correlated(width=32)
    w = module.weight.detach().clone()
    made = permute(module, w, stats_of(x), Selector(PATTERN, 0.5))
    assert isinstance(made, PermutedLinear)
    kept = made.weight != 0
    assert torch.equal(made.weight, w * kept)
    assert PATTERN.verify(made.core.weight != 0)
    torch.testing.assert_close(made(x), x @ (w * kept).t() + module.bias, rtol=1e-4, atol=1e-4)
    scores = score("ria", w, stats_of(x))
    assert (scores * kept).sum() > retained(scores, PATTERN)


def test_saved_loaded_packed_unpacked(tmp_path):
    def net(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8, bias=False))

    model, x = net(0), draw(5, 32)
    pumice.rewrite(model, "permute", data=[correlated(width=32)], progress=False)
    truth = model(x)
    back = pumice.load(pumice.save(model, tmp_path / "out", hint="2:4"), into=net(3))
    assert isinstance(back[0], PermutedLinear)
    assert torch.equal(back[0].order, model[0].order)
    torch.testing.assert_close(back(x), truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pumice.unpack(pumice.pack(back, progress=False))(x), truth, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(PumiceError, match="regroups the inputs of N:M"):
        permute(nn.Linear(8, 4), draw(4, 8), {}, Selector(parse("4x4"), 0.5))
    with pytest.raises(PumiceError, match="sweeps=-1"):
        permute(nn.Linear(8, 4), draw(4, 8), {}, Selector(PATTERN, 0.5), sweeps=-1)
