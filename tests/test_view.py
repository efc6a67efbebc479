"""Weight views: every kind of layer as w_OI, read and written exactly; which layers are found and which are left."""

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from pumice.core.errors import PumiceError
from pumice.core.view import find_views, matches, module_views

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 8}


def only(module):
    (view,) = module_views("layer", module)
    return view


@pytest.mark.parametrize(
    ("module", "shape", "groups"),
    [
        (nn.Linear(6, 4), (4, 6), 1),
        (nn.Linear(6, 4, bias=False, dtype=torch.bfloat16), (4, 6), 1),
        (nn.Conv2d(6, 4, 3), (4, 54), 1),
        (nn.Conv2d(6, 4, (1, 3), groups=2), (4, 9), 2),
        (nn.Conv2d(6, 6, 3, groups=6), (6, 9), 6),
        (nn.Conv1d(6, 4, 5, groups=2), (4, 15), 2),
        (Conv1D(4, 6), (4, 6), 1),
    ],
)
def test_any_layer_is_a_matrix_read_and_written_exactly(module, shape, groups):
    view = only(module)
    before = module.weight.detach().clone()
    w = view.read()
    assert (view.name, view.module_name, view.expert) == ("layer.weight", "layer", None)
    assert (view.shape_OI, tuple(w.shape), view.groups, view.numel) == (shape, shape, groups, shape[0] * shape[1])
    assert w.dtype == torch.float32
    view.write(w)
    assert torch.equal(module.weight, before)
    w.zero_()
    assert torch.equal(module.weight, before), "read must give a copy"
    parameter = module.weight
    view.write(torch.arange(view.numel, dtype=torch.float32).view(shape))
    assert module.weight is parameter
    assert module.weight.dtype == before.dtype
    assert torch.equal(view.matrix().float(), torch.arange(view.numel).view(shape).to(before.dtype).float())


def test_the_matrix_is_what_multiplies_the_input():
    x = torch.randn(5, 6)
    linear, transposed = nn.Linear(6, 4, bias=False), Conv1D(4, 6)
    assert torch.allclose(linear(x), x @ only(linear).read().t())
    assert torch.allclose(transposed(x), x @ only(transposed).read().t() + transposed.bias)


def test_a_gradient_is_seen_in_the_same_orientation():
    for module in (nn.Linear(6, 4), nn.Conv2d(6, 4, 3), Conv1D(4, 6)):
        view = only(module)
        assert torch.equal(view.as_matrix(module.weight * 2), view.read() * 2)


def experts(model):
    return [view for view in find_views(model) if view.expert is not None]


def test_fused_experts_are_one_view_each():
    torch.manual_seed(0)
    views = experts(MixtralForCausalLM(MixtralConfig(**SMALL)))
    assert len(views) == 8
    assert [v.expert for v in views] == [0, 1, 2, 3] * 2
    assert {v.shape_OI for v in views if "gate_up" in v.name} == {(48, 16)}
    assert {v.shape_OI for v in views if "down" in v.name} == {(16, 24)}
    view = views[2]
    others = view.tensor.detach().clone()
    assert view.name.endswith("gate_up_proj.2")
    view.write(torch.ones(48, 16))
    others[2] = 1
    assert torch.equal(view.tensor, others)


def test_transposed_fused_experts_and_their_biases():
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SMALL))
    views = experts(model)
    assert len(views) == 8, "biases are not weights"
    assert {v.shape_OI for v in views if "gate_up" in v.name} == {(48, 16)}
    assert {v.shape_OI for v in views if "down" in v.name} == {(16, 24)}
    view = next(v for v in views if "gate_up" in v.name)
    w = view.read()
    assert torch.equal(w, view.tensor[0].t())
    w[3] = 0
    view.write(w)
    assert (view.tensor[0][:, 3] == 0).all()
    assert (view.tensor[0][:, 4] != 0).any()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.second.weight = self.first.weight
        self.head.weight = self.embed.weight


def test_tied_weights_are_one_view():
    model = Tied()
    assert [v.name for v in find_views(model)] == ["first.weight"]
    assert [v.name for v in find_views(model, targets=["second"])] == ["second.weight"]


def test_a_weight_tied_to_an_ignored_layer_stays_dense():
    model = Tied()
    model.third = nn.Linear(6, 6)
    assert [v.name for v in find_views(model, ignore=["first"])] == ["third.weight"]
    assert [v.name for v in find_views(model, ignore=["second"])] == ["third.weight"]


def test_a_head_tied_to_the_embedding_is_pruned_only_when_asked_for():
    model = Tied()
    assert "head.weight" not in [v.name for v in find_views(model, ignore=())]
    assert [v.name for v in find_views(model, targets=["head"], ignore=())] == ["head.weight"]


@pytest.mark.parametrize(
    ("name", "pattern", "fits"),
    [
        ("model.layers.0.self_attn.q_proj", "q_proj", True),
        ("model.layers.0.self_attn.q_proj", "*_proj", True),
        ("model.layers.0.self_attn.q_proj", "self_attn.*", True),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.*", True),
        ("model.layers.10.mlp", "model.layers.1.*", False),
        ("model.layers.0.self_attn.q_proj", "proj", False),
        ("model.layers.0.self_attn.q_proj", "Q_PROJ", False),
        ("model.layers.0.self_attn.q_proj", r"re:layers\.[0-3]\.", True),
        ("model.layers.7.self_attn.q_proj", r"re:layers\.[0-3]\.", False),
        ("bert.embeddings.project", "embed*", True),
        ("lm_head", "lm_head", True),
        ("lm_head2", "lm_head", False),
    ],
)
def test_patterns_of_names(name, pattern, fits):
    assert matches(name, [pattern]) is fits
    assert matches(name, ["zzz", pattern]) is fits
    assert not matches(name, [])


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_in = nn.Linear(4, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.lm_head = nn.Linear(4, 4)


def names(**given):
    return [view.module_name for view in find_views(Named(), **given)]


def test_targets_and_ignore():
    assert names() == ["body.0", "body.2"]
    assert names(ignore=()) == ["embed_in", "body.0", "body.2", "lm_head"]
    assert names(targets=["body.0"]) == ["body.0"]
    assert names(targets=["body.*", "lm_head"]) == ["body.0", "body.2"], "ignore wins"
    assert names(targets="body.0") == ["body.0"], "one pattern may come as text"
    assert names(ignore="body.0") == ["embed_in", "body.2", "lm_head"]


def test_what_matches_nothing_is_said():
    with pytest.raises(PumiceError, match="targets='boddy'") as caught:
        names(targets=["body.0", "boddy"])
    assert "body.0" in str(caught.value)
    with pytest.raises(PumiceError, match="targets='re:xyz'"):
        names(targets=["re:xyz"])
    with pytest.raises(PumiceError, match="no layer to prune"):
        names(ignore=["*"])
    with pytest.raises(PumiceError, match=r"the model BatchNorm1d has no layer to prune.*none \(only Linear"):
        find_views(nn.BatchNorm1d(3))
    with pytest.raises(PumiceError, match="'re:\\('"):
        names(targets=["re:("])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    model = Named()
    with torch.no_grad():
        model.body[2].weight[1, :2] = value
    first, second = find_views(model)
    first.read()
    with pytest.raises(PumiceError, match=r"layer body\.2\.weight holds 2 NaN or Inf"):
        second.read()
