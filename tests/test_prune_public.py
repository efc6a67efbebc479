"""`pumice.prune` from Python: in memory, from disk to disk, interrupted and resumed, planned beforehand."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import pumice
from pumice.core.errors import PumiceError
from pumice.engine.prune import plan_prune, prune
from pumice.engine.writer import Writer
from pumice.prune.run import Pruner
from pumice.report import disk_bytes
from tests import tiny

IDS = torch.randint(4, 100, (6, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama of four blocks as a checkpoint with a tokenizer."""
    model = tiny.llama(num_hidden_layers=4)
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pumice.unpack(model).state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_from_disk_to_disk_equals_in_memory(folder, tmp_path, method):
    out = tmp_path / "out"
    result = prune(str(folder), method, density=0.5, data=IDS, out=out, progress=False)
    model = load(folder)
    prune(model, method, density=0.5, data=IDS, progress=False)
    assert_same(weights(load(out)), weights(model))
    assert result.density == pytest.approx(0.5, abs=0.02)
    assert result.path == str(out)
    assert not any("loaded whole" in note for note in result.notes)


def test_a_checkpoint_in_many_files_keeps_one_of_them_open(folder, tmp_path, monkeypatch):
    from pumice.engine import disk

    load(folder).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    real, opened = disk.safe_open, []

    class Opened:
        """Files themselves take no weak references."""

        def __init__(self, file, **options):
            self.file = real(file, **options)
            opened.append(weakref.ref(self))

        def get_tensor(self, name):
            return self.file.get_tensor(name)

    monkeypatch.setattr(disk, "safe_open", Opened)
    most = []

    def seen(shards, name):
        tensor = get(shards, name)
        most.append(sum(one() is not None for one in opened))
        return tensor

    get = disk.Shards.get
    monkeypatch.setattr(disk.Shards, "get", seen)
    prune(str(tmp_path / "many"), "wanda", density=0.5, data=IDS, out=tmp_path / "out", progress=False)
    assert len(opened) > 3
    assert max(most) == 1
    model = load(folder)
    prune(model, "wanda", density=0.5, data=IDS, progress=False)
    assert_same(weights(load(tmp_path / "out")), weights(model))


class Stop(Exception):
    pass


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run dies after so many finished blocks."""
    commit = Writer.commit
    seen = []

    def counted(self, **progress):
        commit(self, **progress)
        seen.append(1)
        if len(seen) == count:
            raise Stop

    monkeypatch.setattr(Writer, "commit", counted)


@pytest.mark.parametrize("in_memory", [False, True], ids=["disk", "memory"])
@pytest.mark.parametrize(
    "axes",
    [
        {"score": "obs", "recover": "obs", "density": 0.5},
        {"score": "wanda", "allocation": "owl", "density": 0.4},
        {"score": "magnitude", "allocation": "global", "density": 0.5},
        {"score": "taylor", "density": 0.5},
        {"score": "obs", "recover": "alps", "goal": "dense", "sequential": True, "density": 0.5},
    ],
    ids=["sparsegpt", "owl", "global", "taylor", "dense goal"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, axes, in_memory, monkeypatch):
    def run(out: Path, **options):
        model = load(folder) if in_memory else str(folder)
        return prune(model, axes["score"], data=IDS, out=out, progress=False, **axes, **options)

    run(tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupt_after(2, patched)
        with pytest.raises(Stop):
            run(tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    assert (tmp_path / "cut.partial").exists()
    result = run(tmp_path / "cut", resume=True)
    assert result.resumed_units == 2
    assert len(result.layers) == 28
    assert_same(weights(load(tmp_path / "cut")), weights(load(tmp_path / "whole")))


def test_a_disk_that_fills_at_the_tokenizer_keeps_the_blocks(folder, tmp_path):
    """The tokenizers library reports it by a bare Exception."""

    class Full:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def save_pretrained(self, folder):
            raise Exception("No space left on device (os error 28)")

    options = {"density": 0.5, "data": IDS, "out": tmp_path / "out", "progress": False}
    with pytest.raises(PumiceError, match=r"is full: the tokenizer does not fit.*continue with resume"):
        prune(str(folder), "wanda", tokenizer=Full(tiny.tokenizer()), **options)
    result = prune(str(folder), "wanda", resume=True, **options)
    assert result.resumed_units == 4


def test_resume_with_other_settings_is_refused(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_after(1, patched)
        with pytest.raises(Stop):
            prune(str(folder), "wanda", density=0.5, data=IDS, out=tmp_path / "out", progress=False)
    with pytest.raises(PumiceError, match=r"had recipe\.density=0\.5, now it is 0\.4"):
        prune(str(folder), "wanda", density=0.4, data=IDS, out=tmp_path / "out", resume=True, progress=False)
    with pytest.raises(PumiceError, match="--resume"):
        prune(str(folder), "wanda", density=0.5, data=IDS, out=tmp_path / "out", progress=False)


def test_refusals_come_before_any_work(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Pruner, "run", lambda self: pytest.fail("work was begun"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for message, arguments in {
        "out=None": {},
        "exists": {"out": tmp_path / "full"},
        "density": {"out": tmp_path / "o", "density": 1.5},
        "compute": {"out": tmp_path / "o", "compute": "int4"},
        "does not divide": {"out": tmp_path / "o", "density": None, "pattern": "3:7"},
        "resume": {"out": tmp_path / "o", "resume": True},
    }.items():
        given = {"density": 0.5, **arguments}
        with pytest.raises(PumiceError, match=message):
            prune(str(folder), "wanda", data=IDS, progress=False, **given)
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_data_from_a_text_file_and_settings_from_a_recipe(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 90}" for i in range(2000)))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("score: wanda\ndensity: 0.5\nsamples: 3\nseqlen: 16\nseed: 7\n")
    prune(str(folder), recipe, data=str(text), out=tmp_path / "out", progress=False)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["metadata"]
    assert (stored["samples"], stored["seqlen"], stored["seed"]) == (3, 16, 7)


def test_a_plan_says_what_then_happens(folder, tmp_path):
    plan = plan_prune(str(folder), "wanda", density=0.5)
    result = prune(str(folder), "wanda", density=0.5, data=IDS, out=tmp_path / "out", progress=False)
    assert [layer["name"] for layer in plan.pruned] == [layer.name for layer in result.layers]
    assert sum(layer["params"] for layer in plan.pruned) == 4 * (4 * 32 * 32 + 3 * 32 * 48) or len(plan.pruned) == 28
    assert {layer["name"] for layer in plan.kept} == {"model.embed_tokens", "lm_head"}
    assert plan.disk_bytes == pytest.approx(disk_bytes(tmp_path / "out"), rel=0.3)
    assert plan.seconds is not None
    assert plan.seconds > 0
    assert any("streamed" in note for note in plan.notes)


def test_a_plan_refuses_what_prune_refuses(folder):
    with pytest.raises(PumiceError, match="density"):
        plan_prune(str(folder), "wanda", density=2.0)
    with pytest.raises(PumiceError, match=r"does not exist|hub"):
        plan_prune("no/such-model-here", "wanda", density=0.5)


def test_a_classifier_is_pruned_by_its_own_loss():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    data = [(torch.randn(16, 8), torch.randint(0, 4, (16,)))]
    assert prune(net, "taylor", density=0.5, data=data, progress=False).density == pytest.approx(0.5, abs=0.02)
    assert prune(net, "fisher", density=0.25, data=data, progress=False).density == pytest.approx(0.25, abs=0.02)
