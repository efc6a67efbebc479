"""Old sparse-bitmask and sparse-24-bitmask checkpoints, written here by their documented format, are read exactly."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pumice.core.errors import PumiceError
from pumice.engine.compressed_tensors import load, read_tensors, sparsity_format
from pumice.engine.store import load as store_load
from pumice.weights.modules import SparseLinear, densify
from tests.conformance.test_layouts import half, n_of_m

transformers = pytest.importorskip("transformers")


def bits(mask):
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))


def unstructured(name, w):
    """The four tensors of sparse-bitmask."""
    mask = w != 0
    counts = mask.sum(-1)
    return {
        f"{name}.shape": torch.tensor(w.shape),
        f"{name}.compressed": w[mask],
        f"{name}.bitmask": bits(mask),
        f"{name}.row_offsets": counts.cumsum(0) - counts,
    }


def two_of_four(name, w):
    """The three tensors of sparse-24-bitmask: always two kept of four, zeros among them where fewer are not zero."""
    best = w.abs().view(-1, 4).topk(2, dim=1).indices
    mask = torch.zeros(w.numel() // 4, 4, dtype=torch.bool).scatter_(1, best, True).view(w.shape)
    return {
        f"{name}.shape": torch.tensor(w.shape).reshape(-1, 1),
        f"{name}.compressed": w[mask].reshape(w.shape[0], -1),
        f"{name}.bitmask": bits(mask),
    }


FORMATS = {"sparse-bitmask": unstructured, "sparse-24-bitmask": two_of_four}


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.copy_(n_of_m(*module.weight.shape, 2, 4))
    return model


def write(model, folder, form, where="quantization_config", dtype=torch.float32, suffix=""):
    model = model.to(dtype)
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    stored = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        stored.update(FORMATS[form](stem + suffix, tensor) if stem in linear else {name: tensor})
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    sparsity = {"format": form, "sparsity_structure": "unstructured", "global_sparsity": 0.5, "ignore": ["lm_head"]}
    config[where] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("form", FORMATS)
def test_reads_a_model_exactly(form, tmp_path):
    model = write(tiny_llama(), tmp_path, form, dtype=torch.bfloat16)
    back = load(tmp_path)
    assert back.dtype == torch.bfloat16
    assert sum(isinstance(m, SparseLinear) for m in back.modules()) == 14
    assert {m.layout for m in back.modules() if isinstance(m, SparseLinear)} == {"nm"}
    assert not isinstance(back.lm_head, SparseLinear)
    for (name, a), b in zip(model.state_dict().items(), densify(back).state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert getattr(back.config, "quantization_config", None) is None


@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("where", ["quantization_config", "compression_config"])
def test_older_names_are_read(where, suffix, tmp_path):
    model = write(tiny_llama(), tmp_path, "sparse-bitmask", where, suffix=suffix)
    back = store_load(tmp_path)
    x = torch.randint(3, 64, (1, 7))
    with torch.no_grad():
        torch.testing.assert_close(back(x).logits, model(x).logits)


@pytest.mark.parametrize("shape", [(5, 37), (8, 64), (3, 4, 3, 3)], ids=str)
def test_unstructured_weights_of_any_shape(shape, tmp_path):
    w = half(shape[0], int(np.prod(shape[1:]))).view(shape)
    save_file({**unstructured("conv", w), "conv.bias": torch.ones(3)}, tmp_path / "model.safetensors")
    found = {name: (tensor, sparse) for name, tensor, sparse in read_tensors(tmp_path)}
    assert set(found) == {"conv.weight", "conv.bias"}
    assert torch.equal(found["conv.weight"][0], w)
    assert found["conv.weight"][1]
    assert not found["conv.bias"][1]


def test_parts_in_different_shards(tmp_path):
    w = half(8, 16)
    parts = unstructured("a", w)
    save_file(
        {"a.compressed": parts["a.compressed"], "a.row_offsets": parts["a.row_offsets"]}, tmp_path / "1.safetensors"
    )
    save_file({"a.bitmask": parts["a.bitmask"], "a.shape": parts["a.shape"]}, tmp_path / "2.safetensors")
    assert [(name, torch.equal(tensor, w)) for name, tensor, _ in read_tensors(tmp_path)] == [("a.weight", True)]


def test_into_a_module(tmp_path):
    net = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    w = half(32, 64)
    tensors = {**unstructured("0", w), "0.bias": torch.ones(32), "1.weight": torch.ones(8, 32), "1.bias": torch.ones(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"compression_config": {"format": "sparse-bitmask"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    back = load(tmp_path, into=net)
    assert isinstance(back[0], SparseLinear)
    assert torch.equal(back[0].weight, w)
    assert type(back[1]) is nn.Linear
    with pytest.raises(PumiceError, match="does not fit"):
        load(tmp_path, into=nn.Sequential(nn.Linear(64, 32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a.bitmask"), "lacks bitmask"),
        (lambda t: t.update({"a.compressed": t["a.compressed"][:-1].clone()}), "marks .* values"),
        (lambda t: t.update({"a.bitmask": t["a.bitmask"][:, :-1].clone()}), "has a bitmask"),
        (lambda t: t.update({"a.compressed": t["a.compressed"].to(torch.int8)}), "quantized"),
    ],
    ids=["missing", "short", "narrow", "int8"],
)
def test_damage_is_named(change, message, tmp_path):
    tensors = unstructured("a", half(8, 16))
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PumiceError, match=message):
        list(read_tensors(tmp_path))


def test_other_checkpoints_are_refused(tmp_path):
    with pytest.raises(PumiceError, match=r"config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"sparsity_config": {"format": "dense"}}}')
    with pytest.raises(PumiceError, match="none of the formats"):
        load(tmp_path)
    with pytest.raises(PumiceError, match=r"no \*\.safetensors"):
        list(read_tensors(tmp_path))
    assert sparsity_format({"sparsity_config": {"format": "sparse-24-bitmask"}}) == "sparse-24-bitmask"
    assert sparsity_format({"quantization_config": {"quant_method": "pumice"}}) is None
