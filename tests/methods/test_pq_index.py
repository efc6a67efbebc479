"""SAP's PQ Index: its axioms, its bound, and the shares that follow from it."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.prune.allocate.pq_index import keep_bound, pq_index
from tests.methods.layers import draw
from tests.methods.test_allocations import allocate, kept, mlp


def test_the_index_by_hand_and_its_ends():
    w = torch.tensor([[1.0, 4.0]])
    # (√1 + √4)² / (1 + 4) = 9/5, times 2^(1 − 2).
    assert pq_index(w) == pytest.approx(1 - 0.9)
    assert pq_index(torch.full((3, 5), -7.0)) == pytest.approx(0)
    one = torch.full((1000,), 1e-12)
    one[3] = 1
    assert pq_index(one) > 0.998
    assert pq_index(torch.zeros(4)) == 0


@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0), (0.3, 0.9)])
def test_scale_and_copies_do_not_matter_and_robbing_the_rich_lowers_it(p, q):
    w = draw(6, 7)
    index = pq_index(w, p, q)
    assert pq_index(-3e4 * w, p, q) == pytest.approx(index)
    assert pq_index(torch.cat([w, w]), p, q) == pytest.approx(index), "cloning"
    richer = w.abs().clone()
    order = richer.flatten().argsort()
    richer.view(-1)[order[-1]] -= 0.01
    richer.view(-1)[order[0]] += 0.01
    assert pq_index(richer, p, q) < index, "Robin Hood"


@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("seed", range(4))
def test_the_bound_holds(p, q, seed):
    """Where all but the r largest hold at most η of the r largest's p-norm (to the p), r is at least the bound."""
    w = draw(200, seed=seed) ** 3
    powers = w.abs().double().pow(p).sort(descending=True).values
    for r in (5, 20, 60, 120, 199):
        eta = float(powers[r:].sum() / powers[:r].sum())
        assert r >= keep_bound(w, p, q, eta) - 1e-6


def test_pruned_shares_are_proportional_to_the_index():
    model = mlp(1, 1, 1)
    for power, layer in zip((1, 2, 3), model, strict=True):
        layer.weight.data = layer.weight.data.sign() * layer.weight.data.abs() ** power
    index = [pq_index(layer.weight.data) for layer in model]
    assert index[0] < index[1] < index[2]
    found = allocate("pq-index", model, 0.6)
    truth = [1 - 0.4 * 3 * value / sum(index) for value in index]
    assert list(found.values()) == pytest.approx(truth, abs=1 / 400)
    assert sum(kept(model, found).values()) == 720


def test_beta_caps_what_a_layer_loses():
    model = mlp(1, 1, 1)
    model[2].weight.data = model[2].weight.data ** 9
    found = allocate("pq-index", model, 0.3, beta=0.8)
    assert found["2.weight"] == pytest.approx(0.2)
    assert sum(kept(model, found).values()) == 360


def test_weights_that_are_gone_count_as_pruned():
    model = mlp(1, 1)
    model[0].weight.data.view(-1)[:200] = 0
    assert kept(model, allocate("pq-index", model, 0.75)) == {"0.weight": 200, "1.weight": 400}
    found = kept(model, allocate("pq-index", model, 0.5))
    assert sum(found.values()) == 400
    assert found["0.weight"] < found["1.weight"]


def test_eta_makes_layers_more_alike():
    model = mlp(1, 1)
    model[1].weight.data = model[1].weight.data ** 3
    spread = []
    for eta in (0.0, 1.0):
        one, two = allocate("pq-index", model, 0.5, eta=eta).values()
        spread.append(one - two)
    assert spread[0] > spread[1] > 0


@pytest.mark.parametrize(
    ("options", "said"), [({"p": 1.0}, "p < q"), ({"beta": 0.3}, "larger beta"), ({"eta": -1.0}, "eta")]
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(PumiceError, match=said):
        allocate("pq-index", mlp(1, 1), 0.3, **options)
