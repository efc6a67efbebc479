"""What users get wrong when pruning: one clear sentence, and the model as it was."""

import copy

import pytest
import torch
from torch import nn

from pumice.core.errors import PumiceError
from pumice.engine.shrink import shrink_result
from pumice.prune.axes import Axes
from pumice.prune.run import Pruner
from tests import tiny


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, 12)])
        self.norm = nn.LayerNorm(12)
        self.lm_head = nn.Linear(12, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.lm_head(self.norm(x))


DATA = [torch.randn(10, 16, generator=torch.Generator().manual_seed(0))]


def attempt(model=None, batches=DATA, **given):
    """Prune and return the message of the error; the weights must be what they were."""
    model = Net() if model is None else model
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PumiceError) as caught:
        Pruner(model, Axes.make(**{"score": "wanda", "density": 0.5, **given}), batches, progress=False).run()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) or not torch.isfinite(value).all()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("density", [0, -1, 1.5, "x", float("nan"), True])
def test_density_outside_the_range(density):
    message = attempt(density=density)
    assert f"density={density!r}" in message
    assert "(0, 1]" in message


def test_no_density():
    assert "needs a density" in attempt(density=None)


def test_a_pattern_that_does_not_divide_the_width():
    message = attempt(pattern="3:4", density=None, model=Net(width=18), batches=[torch.randn(4, 18)])
    assert "pattern='3:4' does not fit layer layers.0 of shape 18 x 18: 4 does not divide the width 18" in message
    message = attempt(pattern="16x16", model=Net())
    assert "layers.1" in message
    assert "16 does not divide the height 12" in message


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"score": "wonda"}, ["unknown score 'wonda'", "did you mean 'wanda'", "magnitude"]),
        ({"recover": "obss"}, ["unknown recover 'obss'", "did you mean 'obs'"]),
        ({"allocation": "owll"}, ["unknown allocation 'owll'", "did you mean 'owl'", "lamp"]),
        ({"pattern": "diagonal"}, ["pattern='diagonal'", "unstructured"]),
        ({"allocation": {"name": "owl", "lamda": 0.1}}, ["option of allocation 'owl' 'lamda'", "did you mean 'lam'"]),
        ({"recover": {"name": "obs", "damp": "high"}}, ["damp='high'", "float"]),
        ({"recover": {"name": "obs", "damp": -1.0}}, ["layers.0", "damp=-1.0"]),
        ({"score": {"name": "wanda", "x": 1}}, ["option of score 'wanda' 'x'", "Known: none"]),
    ],
)
def test_unknown_names_and_options(given, parts):
    message = attempt(**given)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value):
    model = Net()
    model.layers[0].weight.data[3, 4] = value
    assert "layer layers.0.weight holds 1 NaN or Inf" in attempt(model, score="magnitude", batches=[])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("recover", ["none", "obs", "dsnot"])
def test_activations_that_are_not_finite(value, recover):
    bad = DATA[0].clone()
    bad[2, 5] = value
    message = attempt(batches=[DATA[0], bad], recover=recover)
    assert "input of layer layers.0.weight holds NaN or Inf" in message


def test_a_loss_that_is_not_finite():
    model = Net()
    with pytest.raises(PumiceError, match="the loss is nan"):
        Pruner(
            model, Axes.make("taylor", density=0.5), DATA, loss=lambda m, b: m(b).sum() * float("nan"), progress=False
        ).run()


def test_no_loss():
    assert "pass loss=" in attempt(score="fisher")


def test_a_model_with_nothing_to_prune():
    assert "LayerNorm has no layer to prune" in attempt(nn.LayerNorm(4), batches=[])


@pytest.mark.parametrize("score", ["wanda", "obs", "taylor", "fisher"])
def test_no_data_where_it_is_needed(score):
    message = attempt(score=score, batches=[])
    assert score in message
    assert "data=" in message


def test_data_is_needed_by_an_allocation_too():
    assert "input_sqnorm" in attempt(score="magnitude", allocation="owl", batches=[])


def test_targets_that_match_nothing():
    message = attempt(targets=["q_proj"])
    assert "targets='q_proj' fits no prunable layer" in message
    assert "layers.0" in message
    assert "no layer to prune" in attempt(targets=["lm_head"])


def test_batches_that_the_model_does_not_take():
    with pytest.raises(RuntimeError):
        Pruner(Net(), Axes.make("wanda", density=0.5), [torch.randn(4, 15)], progress=False).run()


def test_nothing_is_lost_when_a_later_block_fails():
    """Blocks before the bad one stay pruned, the bad one and those behind it stay as they were."""
    model = Net()
    model.layers[1].weight.data[0, 0] = float("nan")
    first = model.layers[0].weight.detach().clone()
    with pytest.raises(PumiceError, match=r"layers\.1\.weight"):
        Pruner(model, Axes.make("wanda", density=0.5), DATA, progress=False).run()
    kept = model.layers[0].weight != 0
    assert kept.float().mean() == 0.5
    assert torch.equal(model.layers[0].weight[kept], first[kept])
    assert (model.layers[1].weight != 0).all()


@pytest.mark.parametrize("tokens", [15, 16])
def test_fewer_tokens_than_inputs_are_told(tokens):
    axes = Axes.make("obs", recover="obs", density=0.5)
    result = Pruner(Net(), axes, [DATA[0].repeat(2, 1)[:tokens]], progress=False).run()
    told = [note for note in result.notes if "2 layers (first layers.0.weight) have more inputs" in note]
    assert len(told) == (tokens < 16)
    assert any("15 calibration tokens for 16 inputs" in note for note in result.layers[0].notes) == (tokens < 16)


class Listed(nn.Module):
    """Three residual blocks in a list, of which the last is never run; or in a dict, which is no list."""

    def __init__(self, lists=True):
        super().__init__()
        made = [nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in range(3)]
        self.blocks = nn.ModuleList(made) if lists else nn.ModuleDict({f"b{i}": b for i, b in enumerate(made)})

    def forward(self, x):
        for block in list(self.blocks if isinstance(self.blocks, nn.ModuleList) else self.blocks.values())[:2]:
            x = x + block(x)
        return x


@pytest.mark.parametrize("method", ["width", "flap", "width-ls"])
def test_layers_that_the_data_never_come_to_are_named_and_left_whole(method):
    model = Listed()
    before = model.blocks[2][0].weight.clone()
    result = shrink_result(model, method, density=0.6, data=[torch.randn(80, 16)], progress=False)
    note = next(note for note in result.notes if "never came there" in note)
    assert "blocks.2.0.weight, blocks.2.2.weight:" in note
    assert torch.equal(model.blocks[2][0].weight, before)
    assert model.blocks[0][0].out_features < 64


@pytest.mark.parametrize(
    "method",
    ["width-ls", "heads", "slicegpt", {"name": "2ssp", "refit": "dense"}, {"name": "cfsp", "refit": "layer"}],
    ids=str,
)
def test_structured_methods_say_where_tokens_are_fewer_than_inputs(method):
    few = {"data": [{"input_ids": torch.arange(4, 9)[None]}], "progress": False}
    result = shrink_result(tiny.llama(num_hidden_layers=3), method, density=0.81, **few)
    assert any("fewer calibration tokens than they have inputs" in note for note in result.notes)
    many = {"data": [{"input_ids": torch.randint(4, 100, (4, 40))}], "progress": False}
    result = shrink_result(tiny.llama(num_hidden_layers=3), method, density=0.81, **many)
    assert not any("fewer calibration tokens" in note for note in result.notes)


@pytest.mark.parametrize(
    ("method", "density", "says"),
    [
        ("depth", 0.3, r"density=0\.3.*one of 3 has to stay, which holds 33\.3%"),
        (
            "2ssp",
            0.02,
            r"density=0\.02 cannot be reached: behind [23] of 3 attentions",
        ),
        ("width", 0.02, r"density=0\.02.*are left; ask for more"),
    ],
)
def test_a_request_that_would_empty_the_model_names_what_can_be_asked_for(method, density, says):
    with pytest.raises(PumiceError, match=says):
        shrink_result(
            tiny.llama(num_hidden_layers=3),
            method,
            density=density,
            data=[{"input_ids": torch.randint(4, 100, (2, 40))}],
            progress=False,
        )


def test_a_single_group_of_heads_stays_and_says_why():
    with pytest.raises(PumiceError, match="single group, of which one has to stay"):
        shrink_result(
            tiny.llama(num_key_value_heads=1), "heads", density=0.9, data=[{"input_ids": torch.arange(4, 40)[None]}]
        )


@pytest.mark.parametrize("method", ["depth", "2ssp", "cfsp", "slicegpt"])
def test_blocks_that_are_no_list_are_refused_where_one_is_needed(method):
    with pytest.raises(PumiceError, match=r"no list of blocks \(nn.ModuleList\).*removes channels"):
        shrink_result(Listed(lists=False), method, density=0.6, data=[torch.randn(80, 16)], progress=False)
    small = shrink_result(Listed(lists=False), "width", density=0.6, data=[torch.randn(80, 16)], progress=False)
    assert small.density <= 0.61
