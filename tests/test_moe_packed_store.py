"""Packed experts survive `save` and `load`: small on disk, small in memory, the same logits."""

import copy

import pytest
import torch
import transformers

import pumice
from pumice.core.errors import PumiceError
from pumice.moe import MoE
from pumice.moe.experts.packed import PackedExperts
from pumice.moe.hf import PackedLayer, pack_experts
from pumice.weights.modules import densify

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
CONFIGS = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 4, "num_key_value_heads": 2},
    "qwen3_moe": {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}
    | {
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "gpt_oss": {"intermediate_size": 24, "num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 8},
}
NAMES = list(CONFIGS)
IDS = torch.arange(1, 13).view(2, 6)


def sparse(name):
    """A small model whose experts are mostly zeros, and its logits."""
    config = transformers.AutoConfig.for_model(name, **SMALL, **CONFIGS[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
        for key, parameter in model.named_parameters():
            if key.endswith(("gate_up_proj", "down_proj")):
                parameter.mul_(torch.rand(parameter.shape) < 0.2)
        return model, model(IDS).logits


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def expert_bytes(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return sum(tensor.nbytes for key, tensor in tensors.items() if ".experts." in key)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_comes_back_with_packed_experts(name, tmp_path):
    model, expected = sparse(name)
    dense, fresh = expert_bytes(model), copy.deepcopy(model)
    layers = pack_experts(model)
    packed = expert_bytes(model)
    assert packed < dense / 2
    pumice.save(model, tmp_path / "out")
    again = pumice.load(tmp_path / "out")
    assert sum(isinstance(module, PackedLayer) for module in again.modules()) == layers
    assert expert_bytes(again) == packed
    assert not any(parameter.dim() == 3 for parameter in again.parameters())
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    into = pumice.load(tmp_path / "out", into=fresh)
    assert expert_bytes(into) == packed
    torch.testing.assert_close(logits(into), logits(again))
    # What was loaded can be filled and saved again.
    pumice.save(again, tmp_path / "twice")
    twice = pumice.load(tmp_path / "twice", into=into)
    torch.testing.assert_close(logits(twice), logits(again))
    files = list((tmp_path / "out").glob("*.safetensors"))
    pumice.save(densify(again), tmp_path / "plain", format="dense")
    assert sum(file.stat().st_size for file in files) < 0.75 * (tmp_path / "plain" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", NAMES)
def test_packed_experts_become_the_ordinary_ones_again(name, tmp_path):
    model, expected = sparse(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pack_experts(model)
    pumice.save(model, tmp_path / "dense", format="dense")
    plain = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "dense")
    assert not any(isinstance(module, PackedLayer) for module in plain.modules())
    torch.testing.assert_close(plain.state_dict(), before)
    torch.testing.assert_close(densify(model).state_dict(), before)
    torch.testing.assert_close(logits(model), expected)


def test_a_layer_of_our_own_comes_back_packed(tmp_path):
    torch.manual_seed(0)
    layer = MoE(32, 48, experts=4, shared=0, kind={"name": "mlp", "activation": "gelu", "bias": True})
    model, fresh = torch.nn.Sequential(layer), torch.nn.Sequential(copy.deepcopy(layer))
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.normal_().mul_(torch.rand(parameter.shape) < 0.3)
        # One matrix that no layout makes smaller: it is stored densely beside the others.
        layer.experts.up_proj[1].normal_()
    x = torch.randn(7, 32)
    expected = model(x)
    layer.experts = PackedExperts.of(layer.experts)
    pumice.save(model, tmp_path / "out")
    loaded = pumice.load(tmp_path / "out", into=fresh)
    assert isinstance(loaded[0].experts, PackedExperts)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    assert loaded[0].experts.nbytes == layer.experts.nbytes
    other = torch.nn.Sequential(MoE(32, 40, experts=4, shared=0, kind={"name": "mlp", "bias": True}))
    with pytest.raises(PumiceError, match=r"0\.experts holds experts of 4x48x32, 4x32x48 in the checkpoint"):
        pumice.load(tmp_path / "out", into=other)
    other[0].experts = torch.nn.Linear(2, 2)
    with pytest.raises(PumiceError, match="wrapped layer of swiglu or mlp experts and is a Linear"):
        pumice.load(tmp_path / "out", into=other)
