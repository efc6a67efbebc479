"""Checkpoints come back exactly, appear whole or not at all, and every way to break one gives one clear error."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pumice.core.errors import PumiceError
from pumice.engine import files
from pumice.engine import writer as writer_module
from pumice.engine.files import write_safetensors
from pumice.engine.store import Writer, load, read_config, save
from pumice.engine.writer import INDEX
from pumice.weights.modules import SparseConv2d, SparseLinear, SparseModule, densify
from pumice.weights.patterns.base import parse
from tests.conformance.test_layouts import half, n_of_m


class Net(nn.Module):
    """One of everything that is stored."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.pixel = nn.Conv2d(16, 32, 1, bias=False)
        self.line = nn.Conv1d(32, 32, 3, padding=1)
        self.norm = nn.BatchNorm1d(32)
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))
        self.full = nn.Linear(32, 32)
        self.embed = nn.Embedding(10, 32)
        self.head = nn.Linear(32, 10, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        y = self.pixel(self.conv(x)).flatten(2)
        y = self.norm(self.line(y)).mean(-1)
        return self.head(self.full(self.body(y)) * self.scale)


def pruned(seed=0, net=None):
    torch.manual_seed(seed)
    net = (net or Net()).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and module is not getattr(net, "full", None):
                w = module.weight
                w.mul_(torch.rand(w.shape) < 0.5)
        if isinstance(net, Net):
            net.body[2].weight.copy_(n_of_m(32, 64, 2, 4))
    return net


def bytes_of(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def tree(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_round_trip_is_exact_and_sparse(tmp_path):
    net = pruned()
    x = torch.randn(2, 4, 6, 6)
    path = save(net, tmp_path / "out", metadata={"method": "magnitude"})
    assert path == tmp_path / "out"
    back = load(path, into=Net()).eval()
    kinds = {name: (type(m), m.layout) for name, m in back.named_modules() if isinstance(m, SparseModule)}
    assert kinds == {
        "conv": (SparseConv2d, "bitmask"),
        "pixel": (SparseConv2d, "bitmask"),
        "body.0": (SparseLinear, "bitmask"),
        "body.2": (SparseLinear, "nm"),
    }
    assert type(back.line) is nn.Conv1d
    assert back.head.weight is back.embed.weight
    for (name, a), b in zip(
        net.state_dict().items(), densify(load(path, into=Net())).state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    with torch.no_grad():
        torch.testing.assert_close(back(x), net(x))
    stored = read_config(path)["quantization_config"]
    assert stored["metadata"] == {"method": "magnitude"}
    assert stored["layers"]["line.weight"]["kind"] == "tensor"
    assert stored["tied"] == {"head.weight": "embed.weight"}
    names = set(load_file(path / "model-00001.safetensors"))
    assert {"body.0.values", "body.0.bitmask", "body.0.bias", "body.2.codes", "line.weight.values", "steps"} <= names
    assert not {"body.0.weight", "head.weight", "scratch"} & names


def test_saving_again_what_was_loaded_gives_the_same_bytes(tmp_path):
    save(pruned(), tmp_path / "a")
    save(load(tmp_path / "a", into=Net()), tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_half_density_bf16_takes_at_most_57_percent(tmp_path):
    net = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 1024, bias=False)).bfloat16()
    with torch.no_grad():
        for layer in net:
            layer.weight.copy_(half(*layer.weight.shape))
    save(net, tmp_path / "out")
    assert bytes_of(tmp_path / "out") <= 0.57 * sum(p.numel() * 2 for p in net.parameters())


@pytest.mark.parametrize("module", [nn.Linear(64, 32), nn.Conv2d(16, 8, 1)], ids=["linear", "conv"])
def test_a_single_layer_is_replaced(module, tmp_path):
    net = pruned(net=module)
    save(net, tmp_path / "out")
    back = load(tmp_path / "out", into=type(module)(*((64, 32) if isinstance(module, nn.Linear) else (16, 8, 1))))
    assert isinstance(back, SparseModule)
    assert torch.equal(back.weight, net.weight)


def test_into_keeps_its_dtype_and_may_be_on_meta(tmp_path):
    net = pruned(net=nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))).bfloat16()
    save(net, tmp_path / "out")
    wide = load(tmp_path / "out", into=nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)))
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert torch.equal(wide[0].weight, net[0].weight.float())
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    filled = load(tmp_path / "out", into=empty)
    assert not any(p.is_meta for p in filled.parameters())
    wide(torch.randn(2, 64))
    filled(torch.randn(2, 64))


def test_a_hint_finds_a_layout_that_nobody_would_try(tmp_path):
    net = nn.Sequential(nn.Linear(60, 20, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(n_of_m(20, 60, 3, 10))
    save(net, tmp_path / "out", hint="3:10")
    assert read_config(tmp_path / "out")["quantization_config"]["layers"]["0"]["params"] == {"n": 3, "m": 10}
    assert torch.equal(
        load(tmp_path / "out", into=nn.Sequential(nn.Linear(60, 20, bias=False)))[0].weight, net[0].weight
    )


def test_dense_format_writes_zeros_out(tmp_path):
    net = pruned()
    save(net, tmp_path / "out", format="dense")
    assert read_config(tmp_path / "out")["quantization_config"]["layers"] == {}
    assert torch.equal(load_file(tmp_path / "out" / "model-00001.safetensors")["body.0.weight"], net.body[0].weight)


def test_safetensors_are_readable_by_the_library(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.arange(7, dtype=torch.uint8),
        "c": torch.tensor([1, 60000], dtype=torch.uint16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "turned": torch.randn(4, 6).t(),
    }
    fact = write_safetensors(tmp_path / "t.safetensors", tensors)
    back = load_file(tmp_path / "t.safetensors")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[k], tensors[k]) and back[k].dtype == tensors[k].dtype for k in tensors)
    assert fact["bytes"] == (tmp_path / "t.safetensors").stat().st_size


def test_existing_folder_is_refused_and_replaced_on_request(tmp_path):
    path = save(pruned(), tmp_path / "out")
    before = tree(path)
    with pytest.raises(PumiceError, match="overwrite=True"):
        save(pruned(1), path)
    assert tree(path) == before
    (path / "leftover.txt").write_text("old")
    save(pruned(1), path, overwrite=True)
    assert not (path / "leftover.txt").exists()
    assert os.listdir(tmp_path) == ["out"]
    assert torch.equal(load(path, into=Net()).full.weight, pruned(1).full.weight)


def test_replacing_without_an_exchange_call(tmp_path, monkeypatch):
    path = save(pruned(), tmp_path / "out")
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    save(pruned(1), path, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert torch.equal(load(path, into=Net()).full.weight, pruned(1).full.weight)


def fill_disk(monkeypatch, after):
    """The disk is full after so many shards."""
    real, written = writer_module.write_safetensors, []

    def write(path, tensors):
        fact = real(path, tensors)
        written.append(fact["bytes"])
        if len(written) > after:
            path.write_bytes(path.read_bytes()[: fact["bytes"] // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return fact

    monkeypatch.setattr(writer_module, "write_safetensors", write)


def test_full_disk_leaves_the_old_folder_and_no_rubbish(tmp_path, monkeypatch):
    path = save(pruned(), tmp_path / "out")
    before = tree(path)
    fill_disk(monkeypatch, 0)
    with pytest.raises(
        PumiceError, match=r"is full: model-00001.safetensors needs [\d,]+ bytes, [\d,]+ are free"
    ) as caught:
        save(pruned(1), path, overwrite=True)
    assert "is as it was" in str(caught.value)
    assert "is removed" in str(caught.value)
    assert tree(path) == before
    assert os.listdir(tmp_path) == ["out"]


def test_full_disk_keeps_what_was_committed(tmp_path, monkeypatch):
    net = pruned()
    fill_disk(monkeypatch, 1)
    with Writer(tmp_path / "out") as writer:
        writer.add_module("body", net.body)
        writer.commit()
        writer.add_module("conv", net.conv)
        with pytest.raises(PumiceError, match="continue with resume"):
            writer.commit()
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path / "out.partial")) == ["journal.json", "model-00001.safetensors"]
    writer = Writer.resume(tmp_path / "out")
    assert writer.done == ["body"]


def test_other_write_errors_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PumiceError, match="cannot be written"):
        save(pruned(), tmp_path / "file" / "out")


def test_streamed_writing_resumes_after_a_kill(tmp_path):
    net = pruned()
    parts = dict(net.named_children())
    with Writer(tmp_path / "out", tied={"head.weight": "embed.weight"}) as writer:
        for name in ("conv", "pixel", "line"):
            writer.add_module(name, parts[name])
            writer.commit(block=name)
        writer.add_module("norm", parts["norm"])
        (writer.partial / "model-00009.safetensors").write_bytes(b"half a shard")
    assert not (tmp_path / "out").exists()
    with pytest.raises(PumiceError, match="--resume"):
        Writer(tmp_path / "out")
    with pytest.raises(PumiceError, match="--resume"):
        load(tmp_path / "out", into=Net())
    with Writer.resume(tmp_path / "out") as writer:
        assert writer.done == ["conv", "pixel", "line"]
        assert writer.progress == {"block": "line"}
        assert not (writer.partial / "model-00009.safetensors").exists()
        for name in ("norm", "body", "full", "embed", "head"):
            writer.add_module(name, parts[name])
        writer.add("scale", net.scale)
        writer.add("steps", net.steps)
        writer.finish()
    assert os.listdir(tmp_path) == ["out"]
    for (name, a), b in zip(
        net.state_dict().items(), densify(load(tmp_path / "out", into=Net())).state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_resume_refuses_damage_and_nothing(tmp_path):
    with pytest.raises(PumiceError, match="no unfinished run"):
        Writer.resume(tmp_path / "out")
    with Writer(tmp_path / "out") as writer:
        writer.add_module("full", pruned().full)
        writer.commit()
    shard = tmp_path / "out.partial" / "model-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(PumiceError, match="checksum"):
        Writer.resume(tmp_path / "out")


def test_a_new_run_may_drop_an_unfinished_one(tmp_path):
    with Writer(tmp_path / "out") as writer:
        writer.add_module("full", pruned().full)
        writer.commit()
    with pytest.raises(PumiceError, match="unfinished run"):
        save(pruned(), tmp_path / "out")
    save(pruned(), tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


def test_shards_are_limited(tmp_path):
    net = pruned()
    with Writer(tmp_path / "out", shard_bytes=4096, tied={"head.weight": "embed.weight"}) as writer:
        writer.add_module("", net)
        writer.finish()
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert set(weight_map.values()) == {shard.name for shard in shards}
    assert torch.equal(load(tmp_path / "out", into=Net()).body[0].weight, net.body[0].weight)


def test_a_name_is_stored_once(tmp_path):
    with Writer(tmp_path / "out") as writer:
        writer.add("a", torch.ones(2))
        with pytest.raises(PumiceError, match="added twice"):
            writer.add("a", torch.ones(2))
    assert os.listdir(tmp_path) == []


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(changes)
    (path / "config.json").write_text(json.dumps(config))


def cut(path):
    shard = path / "model-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def flip(path):
    shard = path / "model-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "was cut off"),
        (flip, "checksum differs"),
        (lambda p: (p / "model-00001.safetensors").unlink(), "lacks model-00001.safetensors"),
        (lambda p: (p / INDEX).unlink(), f"lacks {INDEX}"),
        (lambda p: (p / "config.json").unlink(), "not a Pumice checkpoint"),
        (lambda p: (p / "config.json").write_text("{"), "config.json is damaged"),
        (lambda p: (p / "config.json").write_text("{}"), "not a Pumice checkpoint"),
        (lambda p: change_config(p, format_version=99), "upgrade pumice"),
        (lambda p: change_config(p, quant_method="gptq"), "not a Pumice checkpoint"),
        (lambda p: change_config(p, files={}, layers={"body.0": {"layout": "bitmask"}}), "config.json is damaged"),
    ],
    ids=["cut", "flipped bit", "no shard", "no index", "no config", "bad json", "other", "newer", "gptq", "bad layer"],
)
def test_damage_is_named(damage, message, tmp_path):
    path = save(pruned(), tmp_path / "out")
    damage(path)
    with pytest.raises(PumiceError, match=message):
        load(path, into=Net())


def test_wrong_target_is_named(tmp_path):
    path = save(pruned(), tmp_path / "out")
    net = Net()
    net.body[0] = nn.Linear(32, 65)
    with pytest.raises(PumiceError, match=r"body\.0\.weight is 64x32 in .* and 65x32 in into"):
        load(path, into=net)
    net = Net()
    net.norm = nn.BatchNorm1d(31)
    with pytest.raises(PumiceError, match=r"norm.weight is \[32\]"):
        load(path, into=net)
    net = Net()
    net.more = nn.Linear(2, 2)
    with pytest.raises(PumiceError, match=r"lacks more\.weight, more\.bias"):
        load(path, into=net)
    net = Net()
    net.full = nn.Identity()
    with pytest.raises(PumiceError, match=r"holds unknown full\.bias, full\.weight"):
        load(path, into=net)


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(PumiceError, match="is no folder"):
        load(tmp_path / "nothing", into=Net())
    with pytest.raises(PumiceError, match="format='onnx'"):
        save(Net(), tmp_path / "out", format="onnx")
    with pytest.raises(PumiceError, match="pattern="):
        save(Net(), tmp_path / "out", hint="diagonal")
    path = save(pruned(), tmp_path / "out")
    with pytest.raises(PumiceError, match="into=module"):
        load(path)


def test_patterns_hint_by_object(tmp_path):
    save(pruned(), tmp_path / "out", hint=parse("2:4"))
    assert read_config(tmp_path / "out")["quantization_config"]["layers"]["body.2"]["layout"] == "nm"
