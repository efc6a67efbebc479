"""`from_pretrained` reads Pumice folders after `import pumice`: same logits, sparse modules, any architecture."""

import json
import subprocess
import sys

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.core.view import find_views, module_views
from pumice.engine.hf import install_hook
from pumice.engine.store import load, save
from pumice.weights.modules import SparseLinear, SparseModule, densify

transformers = pytest.importorskip("transformers")
install_hook()
TEXT = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {
    **TEXT,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
T5 = {**TEXT, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SMALL, "num_local_experts": 4}),
    "qwen3 moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        {key: value for key, value in SMALL.items() if key != "num_key_value_heads"},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
}
EXPANDED = {"mixtral": {"gate_up_proj", "down_proj"}, "qwen3 moe": {"gate_up_proj", "down_proj"}}


def halve(model):
    """Zero half of every prunable weight by magnitude."""
    for view in find_views(model, ignore=()):
        w = view.read()
        view.write(w * (w.abs() > w.abs().median()))
    return model.eval()


def make(name):
    torch.manual_seed(0)
    cls, config, options = MODELS[name]
    return halve(getattr(transformers, cls)(getattr(transformers, config)(**options)))


def inputs(name):
    torch.manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids = {"input_ids": torch.randint(3, 96, (2, 12))}
    return {**ids, "decoder_input_ids": torch.randint(3, 96, (2, 5))} if name == "t5" else ids


def logits(model, name):
    with torch.no_grad():
        return model(**inputs(name)).logits


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_reloads_to_the_same_weights_and_logits(name, tmp_path):
    model = make(name)
    save(model, tmp_path / "out")
    back, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    sparse = {n for n, m in back.named_modules() if isinstance(m, SparseModule)}
    replaceable = {
        v.module_name for v in find_views(model, ignore=()) if v.expert is None and v.module_name[-3:] != ".wo"
    }
    assert sparse == replaceable
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["layers"]
    expanded = {key.rpartition(".")[2] for key, entry in layers.items() if entry["kind"] == "tensor"}
    assert expanded == EXPANDED.get(name, set())
    assert not any(p.requires_grad for n, p in back.named_parameters() if n.endswith(".values"))
    torch.testing.assert_close(logits(back, name), logits(model, name), rtol=1e-4, atol=1e-5)
    same(densify(back), model)
    same(densify(load(tmp_path / "out")), model)
    same(densify(load(tmp_path / "out", into=type(model)(model.config))), model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5"])
def test_save_pretrained_of_a_loaded_model_reads_back(name, tmp_path):
    model = make(name)
    save(model, tmp_path / "out", metadata={"method": "magnitude"})
    back = type(model).from_pretrained(tmp_path / "out")
    back.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert any(isinstance(m, SparseLinear) for m in again.modules())
    assert again.config.quantization_config.metadata == {"method": "magnitude"}
    same(densify(again), model)
    same(densify(load(tmp_path / "again")), model)


def test_pumice_save_of_a_loaded_model_gives_the_same_files(tmp_path):
    model = make("mixtral")
    save(model, tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b")
    for file in ("model-00001.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_respected(dtype, tmp_path):
    save(make("mixtral"), tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert {p.dtype for p in back.parameters()} == {dtype}
    expected = make("mixtral").to(dtype)
    same(densify(back), expected)


def test_stored_dtype_is_the_default(tmp_path):
    save(make("llama").bfloat16(), tmp_path / "out")
    assert load(tmp_path / "out").dtype == torch.bfloat16
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_t5_keeps_what_it_wants_in_float32(tmp_path):
    save(make("t5"), tmp_path / "out")
    back = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float16)
    wo = back.encoder.block[0].layer[1].DenseReluDense.wo
    assert type(wo) is torch.nn.Linear, "T5 looks at wo.weight.dtype in every call"
    assert wo.weight.dtype == torch.float32
    assert back.encoder.block[0].layer[0].SelfAttention.q.values.dtype == torch.float16


def test_base_model_of_a_checkpoint_with_a_head(tmp_path):
    for name in ("llama", "mixtral"):
        model = make(name)
        save(model, tmp_path / name)
        base = transformers.AutoModel.from_pretrained(tmp_path / name)
        assert isinstance(base.layers[0].self_attn.q_proj, SparseLinear)
        same(densify(base), model.model)


def test_generates(tmp_path):
    model = make("llama")
    save(model, tmp_path / "out")
    ids = inputs("llama")["input_ids"]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(load(tmp_path / "out").generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_dequantize_gives_the_dense_model(tmp_path):
    model = make("llama")
    save(model, tmp_path / "out")
    back = load(tmp_path / "out").dequantize()
    same(back, model)
    assert not hasattr(back.config, "quantization_config")


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config.update({key: value for key, value in changes.items() if key in config})
    config["quantization_config"].update({key: value for key, value in changes.items() if key not in config})
    (path / "config.json").write_text(json.dumps(config))


def flip(path):
    shard = path / "model-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "checksum"),
        (lambda p: (p / "model-00001.safetensors").write_bytes(b"short"), "cut off"),
        (lambda p: change_config(p, format_version=99), "upgrade pumice"),
        (lambda p: change_config(p, intermediate_size=64), "do not belong together"),
    ],
    ids=["flipped bit", "cut", "newer", "another config"],
)
def test_damage_is_named(damage, message, tmp_path):
    save(make("llama"), tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(PumiceError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_config_alone_prunes_nothing(tmp_path):
    from pumice.engine.hf_quantizer import PumiceConfig

    make("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(PumiceError, match="prunes nothing"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=PumiceConfig())


def test_conv1d_and_conv2d_of_other_architectures(tmp_path):
    config = transformers.WhisperConfig(
        vocab_size=96,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        decoder_start_token_id=1,
    )
    torch.manual_seed(0)
    model = halve(transformers.WhisperForConditionalGeneration(config))
    save(model, tmp_path / "out")
    assert "tensor" in (tmp_path / "out" / "config.json").read_text()
    assert type(load(tmp_path / "out").model.encoder.conv1) is torch.nn.Conv1d
    same(densify(load(tmp_path / "out")), model)
    assert any(module_views(name, module) for name, module in model.named_modules())


ORDERS = {
    "transformers first": "import transformers; from transformers import AutoModelForCausalLM; import pumice.engine.hf as hf",
    "pumice first": "import pumice.engine.hf as hf",
}


@pytest.mark.parametrize("order", ORDERS)
def test_import_order_does_not_matter(order, tmp_path):
    model = make("llama")
    save(model, tmp_path / "out")
    torch.save(logits(model, "llama"), tmp_path / "logits.pt")
    code = f"""
import sys
{ORDERS[order]}
hf.install_hook()
hf.install_hook()
assert ("transformers" in sys.modules) == ({order!r} == "transformers first"), "import must not pull transformers in"
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
assert type(model.model.layers[0].mlp.up_proj).__name__ == "SparseLinear"
torch.manual_seed(1)
with torch.no_grad():
    out = model(torch.randint(3, 96, (2, 12))).logits
torch.testing.assert_close(out, torch.load({str(tmp_path / "logits.pt")!r}), rtol=1e-4, atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
