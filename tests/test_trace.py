"""The tracer: what it couples, that removing equals zeroing, and that what cannot be followed is left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pumice.core.calls import call_model, tensors
from pumice.core.errors import PumiceError
from pumice.core.stream import Stream
from pumice.core.view import find_views
from pumice.prune.trace import explore, remove, remove_all, trace
from tests import tiny
from tests.conftest import package_dir

IDS = {"input_ids": torch.arange(4, 12)[None]}
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """Two convolutions with batch norm around a skip connection."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.c2, self.b2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.short = short if stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))) + self.short(x))


class Gated(nn.Module):
    """Squeeze and excitation, then depthwise and pointwise convolution."""

    def __init__(self, channels):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 2, 1), nn.Conv2d(channels // 2, channels, 1)
        self.depth = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.point = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        gate = torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))
        return x + self.point(F.relu(self.depth(x * gate)))


class Concatenated(nn.Module):
    """Concatenated channels, group norm, grouped convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.c, self.norm, self.d = nn.Conv2d(9, 6, 1), nn.GroupNorm(3, 6), nn.Conv2d(6, 12, 3, groups=3)
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x):
        x = self.a(x)
        return self.out(self.d(self.norm(self.c(torch.cat([x, self.b(F.relu(x))], 1)))))


class FusedGate(nn.Module):
    """SwiGLU with one matrix for gate and up."""

    def __init__(self):
        super().__init__()
        self.wide, self.down = nn.Linear(8, 24), nn.Linear(12, 8)

    def forward(self, x):
        gate, up = self.wide(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Shuffled(nn.Module):
    """A channel shuffle: no single channel can be taken out of its view."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.b(self.a(x))
        n, c, h, w = x.shape
        return self.c(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


def qwen3():
    """Norms inside the heads."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 100}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def cnn():
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*stem, Residual(8, 8), Gated(8), Residual(8, 16, 2), nn.AdaptiveAvgPool2d(2))
    model.extend([nn.Flatten(), nn.Linear(64, 10)])
    for _ in range(3):
        model.train()(torch.randn(8, 3, 8, 8))
    return model.eval()


def made(cls, *args):
    torch.manual_seed(0)
    return cls(*args).eval()


PIXELS = {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))}
MODELS = {
    "llama": (lambda: tiny.llama(tie_word_embeddings=True), IDS),
    "bert": (lambda: tiny.bert("BertForMaskedLM"), IDS),
    "vit": (tiny.vit, PIXELS),
    "gpt2": (gpt2, IDS),
    "gemma2": (tiny.gemma2, IDS),
    "qwen3": (qwen3, IDS),
    "t5": (tiny.t5, {**IDS, "decoder_input_ids": IDS["input_ids"]}),
    "cnn": (cnn, IMAGES),
    "concatenated": (lambda: made(Concatenated), IMAGES),
    "fused": (lambda: nn.Sequential(nn.Linear(4, 8), made(FusedGate), nn.Linear(8, 2)), torch.randn(2, 3, 4)),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)),
        IMAGES[0, 0, :4, :4],
    ),
}


def run(model, batch):
    with torch.no_grad():
        return next(t for t in tensors(call_model(model, batch)) if t.is_floating_point())


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_removing_units_equals_zeroing_what_reads_them(name):
    build, batch = MODELS[name]
    model = build().eval()
    groups = trace(model, batch)
    assert groups
    for group in groups:
        keep = torch.arange(group.units) % 2 == 0
        zeroed, smaller = copy.deepcopy(model), copy.deepcopy(model)
        for member in group.readers:
            weight = zeroed.get_parameter(member.name)
            weight.data.index_fill_(member.axis, member.index_Un[~keep].flatten(), 0.0)
        remove(smaller, group, keep)
        one = copy.deepcopy(model)
        remove(one, group, torch.arange(group.units) > 0)
        assert parameters(model) - parameters(one) == group.cost(model)
        found = run(smaller, batch)
        # A norm over the units themselves sees fewer of them, so only what the residual stream carries may differ.
        if group.block is None and name not in ("cnn", "concatenated", "mlp", "fused"):
            assert found.shape == run(model, batch).shape
        else:
            torch.testing.assert_close(found, run(zeroed, batch), atol=1e-5, rtol=1e-4)


def by_kind(model, batch):
    groups = trace(model, batch)
    return {kind: [g for g in groups if g.kind == kind and g.block is not None] for kind in ("head", "channel")}


def test_a_kv_group_goes_with_its_query_heads_and_modules_know():
    model = tiny.llama()
    group = by_kind(model, IDS)["head"][0]
    assert (group.units, group.heads) == (2, 2)
    sizes = {m.name.split(".")[-2]: (m.axis, m.index_Un.shape[1]) for m in group.members}
    assert sizes == {"q_proj": (0, 16), "k_proj": (0, 8), "v_proj": (0, 8), "o_proj": (1, 16)}
    remove(model, group, [1])
    attention = model.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features, attention.o_proj.in_features) == (16, 8, 16)


def test_tied_tables_stay_tied_and_parameters_stay_the_same_objects():
    model = tiny.llama(tie_word_embeddings=True)
    stream = next(group for group in trace(model, IDS) if group.block is None)
    before = model.model.embed_tokens.weight
    remove(model, stream, range(16))
    assert model.lm_head.weight is model.model.embed_tokens.weight is before
    assert (before.shape[1], model.lm_head.in_features, model.model.embed_tokens.embedding_dim) == (16, 16, 16)


def test_batch_norm_and_depthwise_convolutions_follow():
    model = cnn()
    stream = next(group for group in trace(model, IMAGES) if group.name == "3.c1")
    assert {"1.running_var", "3.b2.bias", "4.depth.weight"} <= {member.name for member in stream.members}
    remove(model, stream, [0, 1, 2])
    assert model[1].num_features == len(model[1].running_mean) == 3
    assert (model[4].depth.groups, model[4].depth.in_channels, model[4].depth.out_channels) == (3, 3, 3)
    run(model, IMAGES)


def test_a_reader_behind_flatten_loses_every_pixel_of_a_channel():
    model = cnn()
    group = next(group for group in trace(model, IMAGES) if group.name == "8")
    reader = next(member for member in group.readers if member.name == "8.weight")
    assert torch.equal(reader.index_Un, torch.arange(64).view(16, 4))


def test_statistics_of_units_come_from_the_inputs_of_their_readers():
    model = tiny.llama()
    group = by_kind(model, IDS)["channel"][1]
    (view, columns) = group.views(model)["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(columns.flatten(), torch.arange(48))
    batches = [{"input_ids": torch.randint(4, 100, (2, 9))}]
    found = {}
    Stream(model, find_views(model), batches).walk(
        lambda unit, collect: found.update(collect(frozenset({"input_mean"})))
    )
    seen = []
    handle = view.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run(model, batches[0])
    handle.remove()
    torch.testing.assert_close(found[view.name]["input_mean"][0], seen[0].flatten(0, 1).mean(0), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_followed_is_named_and_stays():
    found = explore(made(Shuffled), IMAGES)
    assert [group.name for group in found.groups] == ["b"]
    assert "view" in found.left["b.weight axis 0"]

    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.c(torch.sort(self.b(F.relu(self.a(x))))[0])

    found = explore(made(Sorted), torch.randn(3, 4))
    assert [group.name for group in found.groups] == ["b"]
    assert found.unknown == ["sort.default"]
    assert "sort" in found.left["b.weight axis 0"]
    found = explore(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), torch.randn(2, 5, 16))
    assert [group.name for group in found.groups] == ["linear2"]
    assert "MultiheadAttention" in found.left["self_attn.in_proj_weight axis 0"]


def test_a_group_without_which_the_model_does_not_run_is_left_out():
    class Rigid(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.a(x)
            if x.shape[-1] != 6:
                raise ValueError("six")
            return self.b(x)

    assert [group.name for group in trace(made(Rigid), torch.randn(3, 4), check=False)] == ["b"]
    found = explore(made(Rigid), torch.randn(3, 4))
    assert found.groups == []
    assert "does not run" in found.left["b.weight axis 1"]


@pytest.mark.parametrize(
    ("keep", "reason"),
    [([], "keep at least one"), ([99], "units 0 to 47"), (torch.ones(3, dtype=torch.bool), "48 units")],
)
def test_bad_masks_are_refused(keep, reason):
    model = tiny.llama()
    with pytest.raises(PumiceError, match=reason):
        remove(model, by_kind(model, IDS)["channel"][0], keep)


def test_stale_groups_are_refused():
    model = tiny.llama()
    group = by_kind(model, IDS)["channel"][0]
    remove(model, group, range(10))
    with pytest.raises(PumiceError, match="changed since it was traced"):
        remove(model, group, range(5))


def test_efficientnet_lite_is_found_whole():
    package_dir("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    image = torch.randn(1, 3, 64, 64)
    groups = trace(model, image)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    cut = {member.name.removesuffix(".weight") for group in groups for member in group.members if member.axis == 0}
    assert set(convolutions) <= cut
    remove_all(model, [(group, range(group.units // 2)) for group in groups])
    assert run(model, image).shape == (1, 1000)
