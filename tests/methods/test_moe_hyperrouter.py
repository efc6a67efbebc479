"""HyperRouter: a frozen network makes the router's matrix, and one vector is all that learns."""

import torch
import torch.nn.functional as F

from pumice.moe import MoE, RouteContext
from pumice.moe.route.hyper import Hyper

D, E = 12, 6


def made():
    torch.manual_seed(0)
    return MoE(D, 8, E, {"name": "hyper", "hidden": 32}, "token_choice", top_k=2, shared=0)


def test_only_the_vector_is_trained():
    layer = made()
    assert sum(p.numel() for p in layer.router.parameters()) == D
    frozen = {name: value.clone() for name, value in layer.router.named_buffers()}
    matrix = layer.router.generated()[0].detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(torch.randn(20, D)).square().sum().backward()
    assert layer.router.vector_D.grad.abs().sum() > 0
    optimizer.step()
    assert all(torch.equal(value, frozen[name]) for name, value in layer.router.named_buffers())
    assert not torch.allclose(layer.router.generated()[0], matrix), "the matrix follows the vector"


def test_the_matrix_is_the_networks_output_and_the_weights_a_softmax_over_the_selected():
    layer = made()
    router, x = layer.router, torch.randn(9, D)
    assert isinstance(router, Hyper)
    hidden = torch.relu(router.in_HD @ router.vector_D + router.in_bias_H)
    table = (router.out_RH @ hidden + router.out_bias_R).reshape(E, D + 1)
    logits = x @ table[:, :D].t() + table[:, D]
    torch.testing.assert_close(router(x, RouteContext()).logits_TE, logits)
    layer(x)
    value, index = logits.topk(2, dim=1)
    expected = torch.zeros(9, E).scatter(1, index, F.softmax(value, 1))
    torch.testing.assert_close(layer.plan.combine_TE, expected)


def test_a_checkpoint_carries_the_frozen_network():
    layer, x = made(), torch.randn(5, D)
    torch.manual_seed(1)
    other = MoE(D, 8, E, {"name": "hyper", "hidden": 32}, "token_choice", top_k=2, shared=0)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
