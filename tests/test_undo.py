"""An interrupted `pumice.shrink` leaves the model as it was: the same objects with the same values."""

import copy

import pytest
import torch
from torch import nn

import pumice
from pumice.core import registry, structure
from pumice.core.undo import restored_on_failure
from pumice.engine import shrink as engine
from tests import tiny
from tests.test_trace import cnn

TEXT = [{"input_ids": torch.randint(4, 100, (4, 16), generator=torch.Generator().manual_seed(0))}]
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def snapshot(model):
    """Everything that a user could see of a model, by identity and by value."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "tensors": {name: (id(t), t.data_ptr(), t.requires_grad) for name, t in model.named_parameters()},
        "values": copy.deepcopy(model.state_dict()),
        "sizes": {
            name: {key: value for key, value in vars(module).items() if isinstance(value, int | float | tuple | str)}
            for name, module in model.named_modules()
        },
        "config": model.config.to_dict() if hasattr(model, "config") else None,
        "steps": copy.deepcopy(structure.steps(model)),
    }


def assert_same(model, before):
    now = snapshot(model)
    values, then = now.pop("values"), before["values"]
    assert now == {key: value for key, value in before.items() if key != "values"}
    assert values.keys() == then.keys()
    assert all(torch.equal(values[name], then[name]) for name in then)


METHODS = [
    "width",
    {"name": "width", "heads": True},
    {"name": "flap", "multiple": 1},
    "width-ls",
    "depth",
    "2ssp",
    {"name": "cfsp", "multiple": 1, "refit": "dense"},
    "slicegpt",
    {"name": "slicegpt", "rotations": "one"},
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_method_that_is_stopped_at_its_last_change_leaves_nothing(method, error, monkeypatch):
    """The change is made first and the error raised behind it, once for every kind of change, and once behind all."""
    model = tiny.llama(num_hidden_layers=4, tie_word_embeddings=True)
    made: list[str] = []
    stopped: list[str] = []

    def stops(where, name):
        real = getattr(where, name)

        def change(*args, **kwargs):
            found = real(*args, **kwargs)
            made.append(name)
            if stopped and stopped[0] == name and made.count(name) == limit[name]:
                raise error(f"stopped in {name}")
            return found

        monkeypatch.setattr(where, name, change)

    for name in ("resize", "replace", "set_attribute", "note_shapes"):
        stops(structure, name)
    stops(engine, "settle")
    pumice.shrink(copy.deepcopy(model), method, density=0.6, data=TEXT, progress=False)
    limit = {name: made.count(name) for name in set(made)}
    assert "settle" in limit
    for name in limit:
        made.clear()
        stopped[:] = [name]
        before = snapshot(model)
        with pytest.raises(error, match=f"stopped in {name}"):
            pumice.shrink(model, method, density=0.6, data=TEXT, progress=False)
        assert_same(model, before)


def test_a_registered_method_that_raises_in_the_middle_leaves_nothing():
    """Values written in place, a new bias, a replaced module, dropped blocks, a changed config, a foreign attribute."""

    @registry.shrink("breaks-halfway")
    def breaks(model, job):
        """Change everything that there is to change, then fail."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2).requires_grad_(False)
        first = model.model.layers[0]
        first.mlp.down_proj.register_parameter("bias", nn.Parameter(torch.ones(32)))
        first.self_attn = nn.Identity()
        structure.drop_blocks(model, "model.layers", [1])
        model.config.num_hidden_layers = 1
        model.config.architectures = ["Other"]
        model.lm_head.weight = nn.Parameter(torch.zeros(1))
        model.something = 3
        raise ZeroDivisionError

    model = tiny.llama(tie_word_embeddings=True)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = snapshot(model)
    try:
        with pytest.raises(ZeroDivisionError):
            pumice.shrink(model, "breaks-halfway", density=0.5)
    finally:
        del registry.shrink._members["breaks-halfway"]
    assert_same(model, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.grad.sum() == model.lm_head.weight.numel()
    assert not hasattr(model, "something")


def test_buffers_of_a_cnn_come_back(monkeypatch):
    model = cnn()
    before = snapshot(model)
    monkeypatch.setattr(engine, "settle", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pumice.shrink(model, {"name": "precropping", "rounds": 3}, density=0.5, data=IMAGES)
    assert_same(model, before)


def test_hooks_that_were_there_before_can_still_be_removed():
    model = nn.Sequential(nn.Linear(4, 4))
    handle = model[0].register_forward_hook(lambda *args: None)

    def work():
        model[0].register_forward_hook(lambda *args: None)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), restored_on_failure(model):
        work()
    assert len(model[0]._forward_hooks) == 1
    handle.remove()
    assert not model[0]._forward_hooks


def test_nothing_is_undone_when_nothing_fails():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with restored_on_failure(model):
        model[0].weight.data.zero_()
        model.append(nn.Linear(4, 2))
    assert len(model) == 2
    assert not model[0].weight.any()
