"""SMoE-Dropout: the router never learns, k grows to all experts, and any k can be served."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext

D, E = 8, 6


def made(**options):
    torch.manual_seed(0)
    return MoE(D, 8, E, "random", {"name": "growing", **options}, shared=0)


def test_the_router_has_nothing_to_learn():
    layer = made()
    assert not list(layer.router.parameters())
    before = layer.router.weight_ED.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    (layer(torch.randn(20, D)).square().sum() + layer.aux_loss).backward()
    optimizer.step()
    assert torch.equal(layer.router.weight_ED, before)
    assert "router.weight_ED" in layer.state_dict()


def test_k_grows_in_equal_parts_of_the_training_from_first_to_all():
    layer, x = made(first=2), torch.randn(4, D)
    used = []
    for step in range(100):
        layer(x, RouteContext(progress=step / 99))
        used.append(int(layer.plan.statistics()["per_token"]))
    assert used == sorted(used)
    assert set(used) == {2, 3, 4, 5, 6}
    counts = [used.count(k) for k in range(2, 7)]
    assert max(counts) - min(counts) <= 1
    layer(x)
    assert layer.plan.statistics()["per_token"] == 2, "without progress training is at the start"


def test_all_experts_are_the_dense_mixture():
    layer, x = made().eval(), torch.randn(7, D)
    mixture = torch.einsum("te,ted->td", (x @ layer.router.weight_ED.t()).softmax(1), layer.experts.every(x))
    torch.testing.assert_close(layer(x), mixture)


def test_any_k_can_be_served_and_outputs_approach_the_dense_one():
    layer, x = made().eval(), torch.randn(200, D)
    full, distance = layer(x), []
    for k in range(1, E + 1):
        layer.assign.inference = k
        y = layer(x)
        assert layer.plan.statistics()["per_token"] == k
        distance.append(float((y - full).norm()))
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] == 0


def test_what_cannot_be_is_refused():
    with pytest.raises(PumiceError, match="first=3"):
        made(first=3, top_k=2)
    layer = made().eval()
    layer.assign.inference = 7
    with pytest.raises(PumiceError, match="top_k=7"):
        layer(torch.randn(2, D))
