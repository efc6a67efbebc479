"""`pumice.shrink` on every architecture: really smaller, stored so that others load it, and clear about what it refuses."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import pumice
from pumice.cli import app
from pumice.core import registry, structure
from pumice.core.errors import PumiceError
from pumice.engine.shrink import save_shrunk, shrink_result
from tests import tiny
from tests.test_trace import Concatenated, cnn, gpt2, made

IDS = torch.randint(4, 100, (6, 24), generator=torch.Generator().manual_seed(0))
TEXT = [{"input_ids": IDS}]
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LOGITS = """
import sys, torch
{first}
import transformers
model = getattr(transformers, sys.argv[3]).from_pretrained(sys.argv[1]).eval()
assert ("pumice" in sys.modules) == {known}
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2]))[0], sys.argv[2])
"""


def elsewhere(folder, ids, auto="AutoModelForCausalLM", pumice_first=False):
    """What another process, with or without Pumice, gets out of a checkpoint."""
    file = folder.parent / "exchange.pt"
    torch.save(ids, file)
    code = LOGITS.format(first="import pumice" if pumice_first else "", known=pumice_first)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(file), auto], capture_output=True, text=True, cwd=folder.parent
    )
    assert done.returncode == 0, done.stderr
    return torch.load(file)


def outputs(model, ids=IDS):
    with torch.no_grad():
        return model(ids)[0]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ({"name": "width", "heads": True}, {"intermediate_size", "num_attention_heads", "num_key_value_heads"}),
        ({"name": "flap", "allocation": "uniform", "heads": False}, {"intermediate_size", "mlp_bias"}),
        ({"name": "width-ls"}, {"intermediate_size"}),
    ],
    ids=str,
)
def test_a_uniform_result_is_a_plain_checkpoint_for_readers_without_pumice(method, changes, tmp_path):
    model = tiny.llama(tie_word_embeddings=True, num_key_value_heads=4)
    before = model.config.to_dict()
    result = shrink_result(model, method, density=0.55, data=TEXT)
    assert result.ordinary
    path = save_shrunk(result, tmp_path / "small")
    stored = json.loads((path / "config.json").read_text())
    assert "quantization_config" not in stored
    assert changes <= {key for key, value in stored.items() if before.get(key) != value}
    assert torch.equal(elsewhere(path, IDS), outputs(result.model))


@pytest.mark.parametrize("build", [tiny.llama, gpt2], ids=["llama", "gpt2"])
def test_different_widths_are_stored_with_their_structure(build, tmp_path):
    model = build()
    result = shrink_result(model, {"name": "flap", "multiple": 1}, density=0.7, data=TEXT)
    assert not result.ordinary
    assert any("different widths" in note for note in result.notes)
    path = save_shrunk(result, tmp_path / "small")
    expected = outputs(model)
    assert torch.equal(elsewhere(path, IDS, pumice_first=True), expected)
    loaded = pumice.load(path)
    assert torch.equal(outputs(loaded), expected)
    assert torch.equal(outputs(pumice.load(path, into=build())), expected)
    with pytest.raises(PumiceError, match="format='pumice'"):
        pumice.save(model, tmp_path / "dense", format="dense")
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(outputs(again), expected)


def test_a_smaller_model_can_be_shrunk_pruned_and_packed_again(tmp_path):
    model = tiny.llama()
    pumice.shrink(model, {"name": "flap", "multiple": 1}, density=0.8, data=TEXT)
    smaller = shrink_result(model, "width-ls", density=0.8, data=TEXT)
    pumice.prune(model, "wanda", density=0.5, data=TEXT, progress=False)
    path = save_shrunk(smaller, tmp_path / "small")
    assert torch.equal(outputs(pumice.load(path)), outputs(model))
    assert torch.allclose(outputs(pumice.pack(copy.deepcopy(model))), outputs(model), atol=1e-4)


def test_any_module_is_saved_and_loaded_into_the_original(tmp_path):
    for build, method in (
        (cnn, "width"),
        (cnn, {"name": "flap", "multiple": 1}),
        (lambda: made(Concatenated), "width"),
    ):
        model = build()
        result = shrink_result(model, method, density=0.7, data=IMAGES)
        assert result.density <= 0.7 + 0.01
        assert any("into=" in note for note in result.notes)
        path = save_shrunk(result, tmp_path / "small", overwrite=True)
        assert torch.equal(outputs(pumice.load(path, into=build()), IMAGES), outputs(model, IMAGES))


def test_what_transformers_does_not_accept_is_no_plain_checkpoint(tmp_path):
    """Llama's config wants a width that its number of heads divides."""
    model = tiny.llama(num_key_value_heads=4)
    result = shrink_result(model, {"name": "width", "heads": True}, density=0.7)
    assert model.model.layers[0].self_attn.q_proj.out_features == 24
    assert not result.ordinary
    assert model.config.num_attention_heads == 4
    path = save_shrunk(result, tmp_path / "small")
    assert torch.equal(outputs(pumice.load(path)), outputs(model))


def test_a_structure_of_another_model_is_refused(tmp_path):
    result = shrink_result(tiny.llama(), {"name": "width", "allocation": "adaptive", "multiple": 1}, density=0.8)
    path = save_shrunk(result, tmp_path / "small")
    with pytest.raises(PumiceError):
        pumice.load(path, into=cnn())


def test_a_checkpoint_names_no_code_but_modules_of_pumice():
    for name in ("os:system", "pumice.cli:main", "pumice.engine.files:shutil"):
        step = {"do": "replace", "module": "0", "class": name, "arguments": {}}
        with pytest.raises(PumiceError, match=r"no module of Pumice|does not fit"):
            structure.rebuild(nn.Sequential(nn.Linear(2, 2)), {"steps": [step], "shapes": {}})


def test_dropped_blocks_change_the_number_of_layers(tmp_path):
    from pumice.engine.ordinary import settle

    model = tiny.llama(num_hidden_layers=4)
    structure.drop_blocks(model, "model.layers", [0, 3])
    assert settle(model)
    assert model.config.num_hidden_layers == 2
    path = pumice.save(model, tmp_path / "small", format="dense")
    assert torch.equal(elsewhere(path, IDS), outputs(model))


METHODS = [info.name for info in registry.methods("shrink")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "build", [lambda: tiny.llama(num_key_value_heads=4, num_hidden_layers=3), cnn], ids=["llama", "cnn"]
)
def test_every_method_shrinks_or_says_why_not(method, build):
    model = build()
    data = TEXT if hasattr(model, "config") else IMAGES
    before = sum(p.numel() for p in model.parameters())
    try:
        result = shrink_result(model, method, density=0.85, data=data, loss=lambda m, b: m(*b.values()).square().mean())
    except PumiceError as error:
        if len(str(error)) > 30:
            return
        raise
    assert sum(p.numel() for p in result.model.parameters()) == result.parameters["all"] < before
    found = outputs(result.model, data[0]["input_ids"] if data is TEXT else data)
    assert torch.isfinite(found).all()


def test_density_one_removes_nothing():
    model = tiny.llama()
    before = copy.deepcopy(model.state_dict())
    result = shrink_result(model, {"name": "width", "heads": True}, density=1.0)
    assert result.density == 1.0
    assert all(torch.equal(value, before[key]) for key, value in result.model.state_dict().items())


@pytest.mark.parametrize(
    ("method", "given", "reason"),
    [
        ("widht", {"density": 0.8}, "did you mean 'width'"),
        ("width", {"density": 0.0}, "outside \\(0, 1\\]"),
        ("width", {"density": 1.5}, "outside \\(0, 1\\]"),
        ("width", {"density": 0.01}, "cannot be reached"),
        ({"name": "width", "headz": True}, {"density": 0.8}, "did you mean 'heads'"),
        ({"name": "width", "allocation": "global"}, {"density": 0.8}, "uniform, adaptive"),
        ({"name": "width", "multiple": 0}, {"density": 0.8}, "at least 1"),
        ("flap", {"density": 0.8}, "no tokenizer"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_before_the_model_changes(method, given, reason):
    model = tiny.llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PumiceError, match=reason):
        pumice.shrink(model, method, progress=False, **given)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_modules_need_data_to_be_seen_and_measured():
    with pytest.raises(PumiceError, match="must run once"):
        pumice.shrink(cnn(), "width", density=0.8)
    with pytest.raises(PumiceError, match="needs input_mean"):
        pumice.shrink(cnn(), "flap", density=0.8)
    with pytest.raises(PumiceError, match="could be taken out"):
        pumice.shrink(nn.Sequential(nn.Linear(4, 2)), "width", density=0.8, data=torch.randn(3, 4))
    packed = pumice.pack(tiny.llama())
    from pumice.weights.modules import SparseModule

    if any(isinstance(module, SparseModule) for module in packed.modules()):
        with pytest.raises(PumiceError, match="unpack"):
            pumice.shrink(packed, "width", density=0.8)


@pytest.fixture
def place(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.words(2000))
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_the_command_writes_a_checkpoint_that_loads_and_says_what_it_did(place):
    data = ["--data", place / "text.txt", "--samples", "4", "--seqlen", "16"]
    arguments = ["shrink", place / "model", "-o", place / "small", "--method", "width-ls", "--density", "0.8", *data]
    done = call(*arguments, "--set", "multiple=8", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ordinary"]
    assert found["method"]["multiple"] == 8
    assert found["parameters"]["all"] < found["parameters"]["all_before"]
    assert elsewhere(place / "small", IDS).shape == (6, 24, 100)
    assert call("generate", place / "small", "w1 w2", "--max-new-tokens", "2").exit_code in (0, 2)
    refused = call(*arguments)
    assert refused.exit_code == 2
    assert "overwrite" in refused.stderr
    again = call(*arguments, "--overwrite")
    assert again.exit_code == 0, again.output
    assert "plain Transformers checkpoint" in again.stdout


def test_a_dry_run_lists_the_groups_and_writes_nothing(place):
    before = sorted(place.iterdir())
    arguments = ["shrink", place / "model", "--method", "width", "--density", "0.8", "--dry-run"]
    found = json.loads(call(*arguments, "--json").stdout)
    kinds = {(group["kind"], group["units"]) for group in found["groups"] if group["block"]}
    assert kinds == {("channel", 48), ("head", 4)} or kinds == {("channel", 48), ("head", 2)}
    shown = call(*arguments)
    assert "Nothing was written" in shown.stdout
    assert sorted(place.iterdir()) == before
    assert call("shrink", place / "model", "--method", "width", "--density", "0.8").exit_code == 2
    wrong = call(*arguments, "--set", "heads")
    assert "OPTION=VALUE" in wrong.stderr
