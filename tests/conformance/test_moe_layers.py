"""Every layer that is built of MoE layers: any shape, half precision, repeatable, its options explained."""

import copy

import pytest
import torch

from pumice import moe
from pumice.core import registry
from pumice.moe import aux_loss, layers
from pumice.moe.composite.base import Layered

D, E = 16, 8
LAYERS = [info.name for info in registry.methods("moe_layer")]


def make(name):
    torch.manual_seed(0)
    return registry.moe_layer.bind(name)(D, 8, E, {"balance": {"load": 0.01}})


def tokens(*shape):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", LAYERS)
class TestEveryLayer:
    def test_trains_on_any_shape(self, name):
        for shape in ((2, 6), (1, 1), (0, 6), (5,), (0,)):
            made, x = make(name), tokens(*shape).requires_grad_()
            y = made(x)
            assert y.shape == x.shape
            assert torch.isfinite(y).all()
            (y.square().sum() + made.aux_loss).backward()
            assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)
            assert x.grad is not None

    def test_half_precision_keeps_routers_in_float32(self, name):
        made = make(name).to(torch.bfloat16)
        assert made(tokens(2, 6).bfloat16()).dtype is torch.bfloat16
        for _, one in made.inner():
            assert all(p.dtype is torch.float32 for p in one.router.parameters())

    def test_repeats_itself_and_lives_in_a_checkpoint(self, name):
        made = make(name)
        twin = copy.deepcopy(made)
        for p in twin.parameters():
            torch.nn.init.normal_(p)
        twin.load_state_dict(made.state_dict())
        assert torch.equal(made.eval()(tokens(2, 6)), twin.eval()(tokens(2, 6)))

    def test_a_model_sees_the_moe_layers_inside(self, name):
        made = make(name)
        assert isinstance(made, Layered)
        made(tokens(2, 6))
        found = dict(layers(torch.nn.Sequential(made)))
        assert len(found) == len(made.inner()) >= 1
        torch.testing.assert_close(aux_loss(made), made.aux_loss)
        assert set(made.statistics()) == {one.removeprefix("0.") for one in found}

    def test_options_are_explained(self, name):
        info = registry.moe_layer.get(name)
        assert info.paper
        assert all(option.help for option in info.options.values())


def test_discovery_hides_no_public_name():
    registry.methods()
    assert callable(moe.layers)
    assert all(hasattr(moe, name) for name in moe.__all__)
