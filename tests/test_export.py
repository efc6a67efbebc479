"""Exports load without Pumice: dense checkpoints in plain Transformers, ONNX in ONNX Runtime."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pumice.core.errors import PumiceError
from pumice.engine.export import export
from pumice.engine.store import load, save
from tests.test_hf import inputs, logits, make, same
from tests.test_store import Net, pruned

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "mixtral", "t5", "vit"])
def test_dense_is_what_transformers_reads(name, tmp_path):
    model = make(name)
    save(model, tmp_path / "sparse")
    export(load(tmp_path / "sparse"), tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    back, info = type(model).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    same(back, model)


def test_dense_keeps_dtype_and_generation_config(tmp_path):
    model = make("llama").bfloat16()
    model.generation_config.max_new_tokens = 7
    save(model, tmp_path / "sparse")
    export(tmp_path / "sparse", tmp_path / "dense")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert back.dtype == torch.bfloat16
    assert back.generation_config.max_new_tokens == 7
    assert save(load(tmp_path / "sparse"), tmp_path / "also", format="dense").is_dir()
    assert (tmp_path / "also" / "model.safetensors").read_bytes() == (
        tmp_path / "dense" / "model.safetensors"
    ).read_bytes()


def test_dense_loads_where_pumice_is_not_imported(tmp_path):
    model = make("llama")
    save(model, tmp_path / "sparse")
    export(tmp_path / "sparse", tmp_path / "dense")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "dense")!r})
assert "pumice" not in sys.modules
torch.manual_seed(1)
torch.save(model(torch.randint(3, 96, (2, 12))).logits.detach(), {str(tmp_path / "logits.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model, "llama"))


def test_dense_of_other_modules(tmp_path):
    net = pruned()
    save(net, tmp_path / "sparse")
    export(load(tmp_path / "sparse", into=Net()), tmp_path / "dense")
    state = load_file(tmp_path / "dense" / "model-00001.safetensors")
    assert torch.equal(state["body.0.weight"], net.body[0].weight)
    assert torch.equal(state["conv.weight"], net.conv.weight)


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    save(make("llama"), tmp_path / "sparse")
    model = load(tmp_path / "sparse")
    before = logits(model, "llama")
    export(model, tmp_path / "dense")
    assert hasattr(model.config, "quantization_config")
    assert torch.equal(logits(model, "llama"), before)


def test_bad_requests(tmp_path, monkeypatch):
    model = make("llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(PumiceError, match="overwrite=True"):
        export(model, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    export(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists()
    with pytest.raises(PumiceError, match="format='gguf'"):
        export(model, tmp_path / "new", format="gguf")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else found(name, *rest))
    with pytest.raises(PumiceError, match=r"pip install 'pumice\[export\]'"):
        export(model, tmp_path / "new", format="onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def session(folder):
    return pytest.importorskip("onnxruntime").InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )


@pytest.fixture
def onnx():
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="needs the extra pumice[export]")


@pytest.mark.usefixtures("onnx")
@pytest.mark.parametrize("name", ["llama", "mixtral", "vit"])
def test_onnx_gives_the_same_logits(name, tmp_path):
    model = make(name)
    save(model, tmp_path / "sparse")
    export(tmp_path / "sparse", tmp_path / "onnx", format="onnx")
    assert (tmp_path / "onnx" / "config.json").exists()
    feed = inputs(name)
    if name != "vit":
        feed["attention_mask"] = torch.ones_like(feed["input_ids"])
    out = session(tmp_path / "onnx").run(None, {key: value.numpy() for key, value in feed.items()})[0]
    torch.testing.assert_close(torch.from_numpy(out), logits(model, name), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("onnx")
def test_onnx_of_other_modules_takes_example_inputs(tmp_path):
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with pytest.raises(PumiceError, match="inputs="):
        export(net, tmp_path / "out", format="onnx")
    export(net, tmp_path / "out", format="onnx", inputs=(torch.randn(2, 8),))
    x = torch.randn(5, 8)
    out = session(tmp_path / "out").run(None, {"input_0": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(out), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("onnx")
def test_what_cannot_be_exported_says_why(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum().item() > 0 else x

    with pytest.raises(PumiceError, match="torch cannot export Branching"):
        export(Branching(), tmp_path / "out", format="onnx", inputs=(torch.randn(2, 8),))
    assert not list(tmp_path.iterdir())
