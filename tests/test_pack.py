"""Packing keeps what is fastest, says why, computes the same, and can be undone."""

import copy

import pytest
import torch
from torch import nn

import pumice
from pumice.core import dispatch
from pumice.core.errors import PumiceError
from pumice.engine import layer_timing
from pumice.weights.modules import SparseLinear


def model(density: float = 0.5, width: int = 96) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width, bias=False))
    if density < 1:
        pumice.prune(net, "magnitude", density=density)
    return net


def clock(fast: str, monkeypatch: pytest.MonkeyPatch, kind: str = "layout") -> None:
    """Times that do not depend on the machine: the layout (or backend) `fast` takes 1 ms, dense 2, all others 3."""

    def timed(runs):
        for timing, run in runs:
            run()
            timing.ms = 1.0 if getattr(timing, kind) == fast else 2.0 if timing.layout == "dense" else 3.0

    monkeypatch.setattr(layer_timing, "time_in_turns", timed)


@pytest.mark.parametrize("fast", ["bitmask", "csr", "dense"])
def test_the_fastest_layout_is_kept_and_the_reason_told(fast, monkeypatch):
    clock(fast, monkeypatch)
    net = model()
    x = torch.randn(3, 96)
    before = net(x)
    packed = pumice.pack(net, batch=(1, 4), progress=False)
    layers = pumice.describe(packed).layers
    assert [layer.layout for layer in layers] == [fast, fast]
    for layer in layers:
        assert fast in layer.reason
        assert layer.shape in ((192, 96), (96, 192))
        assert set(layer.ms) == {1, 4} == set(layer.dense_ms)
        assert layer.density == pytest.approx(0.5, abs=0.01)
    assert isinstance(packed[0], SparseLinear) or fast == "dense"
    torch.testing.assert_close(packed(x), before, rtol=1e-4, atol=1e-4)


def test_of_several_parameters_of_one_layout_the_fastest_are_kept(monkeypatch):
    def timed(runs):
        for timing, run in runs:
            run()
            timing.ms = 1.0 if timing.params == {"r": 8, "c": 8} else 2.0

    monkeypatch.setattr(layer_timing, "time_in_turns", timed)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        net[0].weight[:32, :32] = 0
    layer = pumice.describe(pumice.pack(net, progress=False, remeasure=True)).layers[0]
    assert (layer.layout, layer.params, layer.ms) == ("block", {"r": 8, "c": 8}, {1: 1.0})


def test_what_was_measured_here_is_not_measured_again(monkeypatch, tmp_path):
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path))
    clock("bitmask", monkeypatch)
    first = pumice.describe(pumice.pack(model(), batch=(1, 4), progress=False))
    clock("dense", monkeypatch)
    again = pumice.describe(pumice.pack(model(), batch=(1, 4), progress=False))
    assert again == first
    changed = {
        "batch": pumice.pack(model(), batch=4, progress=False),
        "density": pumice.pack(model(0.4), batch=(1, 4), progress=False),
        "remeasure": pumice.pack(model(), batch=(1, 4), remeasure=True, progress=False),
    }
    for why, net in changed.items():
        assert {layer.layout for layer in pumice.describe(net).layers} == {"dense"}, why
    assert pumice.describe(pumice.pack(model(), batch=(1, 4), progress=False)).layers[0].layout == "dense"


def test_a_damaged_or_forbidden_cache_only_costs_the_time(monkeypatch, tmp_path):
    clock("bitmask", monkeypatch)
    for folder in (tmp_path, tmp_path / "file" / "below"):
        (tmp_path / "file").touch()
        monkeypatch.setenv("PUMICE_CACHE", str(folder))
        pumice.pack(model(), progress=False)
        for file in folder.glob("pack/*.json"):
            file.write_text('{"layout": "bit')
        assert pumice.describe(pumice.pack(model(), progress=False)).layers[0].layout == "bitmask"


def test_unpack_gives_the_very_weights_back(monkeypatch):
    clock("bitmask", monkeypatch)
    net = model()
    weights = [net[0].weight.clone(), net[2].weight.clone()]
    dense = pumice.unpack(pumice.pack(net, progress=False))
    assert [type(dense[0]), type(dense[2])] == [nn.Linear, nn.Linear]
    assert torch.equal(dense[0].weight, weights[0])
    assert torch.equal(dense[2].weight, weights[1])


def test_a_layer_without_zeros_stays_dense():
    layers = pumice.describe(pumice.pack(model(1.0), progress=False)).layers
    assert {layer.layout for layer in layers} == {"dense"}
    assert all("no zeros" in layer.reason for layer in layers)


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 300])
def test_any_number_of_rows_runs_after_packing_for_one(rows, monkeypatch):
    clock("bitmask", monkeypatch)
    net = model()
    reference = copy.deepcopy(net)
    packed = pumice.pack(net, batch=1, progress=False)
    x = torch.randn(rows, 96)
    torch.testing.assert_close(packed(x), reference(x), rtol=1e-4, atol=1e-4)


def test_real_timing_measures_every_backend_or_gives_its_reason():
    packed = pumice.pack(model(), batch=(1,), progress=False)
    timings = pumice.describe(packed).layers[0].timings
    assert {timing.layout for timing in timings} >= {"dense", "bitmask"}
    assert all((timing.ms is None) == (timing.reason is not None) for timing in timings)
    assert all(timing.ms > 0 for timing in timings if timing.ms is not None)


def test_bytes_count_what_is_stored(monkeypatch):
    clock("bitmask", monkeypatch)
    described = pumice.describe(pumice.pack(model(), progress=False))
    assert described.bytes == sum(layer.bytes for layer in described.layers)
    assert described.bytes < 0.56 * described.dense_bytes
    assert described.to_dict()["layers"][0]["name"] == "0"


def test_convolutions_and_tied_weights_are_left_and_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.conv = nn.Conv1d(16, 16, 3)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.embed.weight

    net = pumice.pack(Net(), progress=False)
    assert type(net.head) is nn.Linear
    assert [(layer.name, layer.layout) for layer in pumice.describe(net).layers] == [("conv.weight", "dense")]


def test_describe_works_without_pack():
    described = pumice.describe(model())
    assert len(described.layers) == 2
    assert described.layers[0].density == pytest.approx(0.5, abs=0.01)


def test_packing_twice_and_copying_is_harmless(monkeypatch):
    clock("bitmask", monkeypatch)
    net = pumice.pack(model(), progress=False)
    again = pumice.pack(copy.deepcopy(net), batch=(1, 8), progress=False)
    x = torch.randn(2, 96)
    torch.testing.assert_close(again(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [0, (), (1, -2), (1.5,)])
def test_bad_batches_are_refused(batch):
    with pytest.raises(PumiceError, match="batch"):
        pumice.pack(model(), batch=batch)


def test_values_changes_the_type_and_refuses_others():
    packed = pumice.pack(model(), values="bfloat16", progress=False)
    assert packed(torch.randn(1, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(PumiceError, match="values"):
        pumice.pack(model(), values="int5")


def test_activations_are_rounded_only_if_asked(monkeypatch):
    call = dispatch.Call("linear", "int8", torch.bfloat16, "cpu", 64, (192, 96), {}, "int8")
    if {backend.name: reason for backend, reason in dispatch.candidates(call)}.get("bytes", "not built") is not None:
        pytest.skip("this CPU does not multiply bytes")
    clock("bytes", monkeypatch, "backend")
    x = torch.randn(64, 96).bfloat16()
    exact = pumice.pack(model(1.0), batch=64, values="bfloat16", progress=False)(x)
    net = pumice.pack(model(1.0).bfloat16(), batch=64, values="int8", progress=False)
    assert all(layer.layout == "dense" for layer in pumice.describe(net).layers)
    net = pumice.pack(model(1.0).bfloat16(), batch=64, values="int8", activations="int8", progress=False)
    layers = pumice.describe(net).layers
    assert [(layer.layout, layer.backends) for layer in layers] == [("int8", {64: "bytes"})] * 2
    assert all(module.activations == "int8" for module in net if isinstance(module, SparseLinear))
    assert 0 < (net(x) - exact).norm() / exact.norm() < 0.03
    # Integers again, and those of the layers that were packed before.
    assert torch.equal(pumice.pack(net, batch=64, activations="int8", progress=False)(x), net(x))
    again = pumice.pack(net, batch=64, progress=False)
    assert not any(getattr(module, "activations", None) for module in again)


def test_a_copy_of_the_weight_is_kept_only_for_rows_that_were_asked_for(monkeypatch):
    call = dispatch.Call("linear", "dense", torch.float32, "cpu", 256, (192, 96), {})
    if {backend.name: reason for backend, reason in dispatch.candidates(call)}.get("onednn", "unknown") is not None:
        pytest.skip("this PyTorch has no oneDNN that takes a weight in its own order")
    clock("onednn", monkeypatch, "backend")
    x = torch.randn(300, 96)
    want = model(1.0)(x)
    for batch, names in ((1, {"onednn"}), (256, {"onednn"}), ((1, 256), {"onednn"})):
        net = pumice.pack(model(1.0), batch=batch, progress=False)
        layers = pumice.describe(net).layers
        assert {name for layer in layers for name in layer.backends.values()} == names
        torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-4)

    def timed(runs):
        for timing, run in runs:
            run()
            timing.ms = 1.0 if (timing.backend == "onednn") == (timing.rows == 256) else 2.0

    monkeypatch.setattr(layer_timing, "time_in_turns", timed)
    net = pumice.pack(model(1.0), batch=1, progress=False)
    assert all(layer.bytes == layer.dense_bytes for layer in pumice.describe(net).layers)
    torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-4)
    net = pumice.pack(model(1.0), batch=(1, 256), progress=False)
    assert all(layer.bytes == 2 * layer.dense_bytes for layer in pumice.describe(net).layers)


@pytest.mark.parametrize("values", [None, "int4", "bfloat16"])
def test_activations_without_weights_of_eight_bits_are_refused(values):
    with pytest.raises(PumiceError, match="give values='int8' as well"):
        pumice.pack(model(), values=values, activations="int8")
    with pytest.raises(PumiceError, match="activations='int4' must be 'int8' or None"):
        pumice.pack(model(), values="int8", activations="int4")


def test_zeros_elsewhere_are_measured_for_themselves(monkeypatch):
    """Layers of one shape and density share a measurement, but 2:4 is nothing for zeros that lie anywhere."""
    clock("nm", monkeypatch)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        for index in (0, 2):
            net[index].weight.mul_(torch.rand(64, 16, 4).argsort(-1).lt(2).flatten(1))
        net[1].weight.mul_(torch.rand(4096).argsort().lt(2048).view(64, 64))
    x = torch.randn(3, 64)
    before = net(x)
    packed = pumice.pack(net, progress=False)
    assert [layer.layout for layer in pumice.describe(packed).layers] == ["nm", "dense", "nm"]
    torch.testing.assert_close(packed(x), before, rtol=1e-4, atol=1e-4)


def test_of_layouts_as_fast_as_each_other_the_smallest_is_kept(monkeypatch):
    def timed(runs):
        for timing, run in runs:
            run()
            timing.ms = {"dense": 2.0, "bitmask": 1.0, "nm": 1.04, "csr": 1.06, "csr-tiles": 1.06}[timing.layout]

    monkeypatch.setattr(layer_timing, "time_in_turns", timed)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        net[0].weight.mul_(torch.rand(64, 16, 4).argsort(-1).lt(1).flatten(1))
    (layer,) = pumice.describe(pumice.pack(net, progress=False)).layers
    # Half a bit a weight smaller than the bitmask, which was a little faster; CSR is smaller still, but slower.
    assert layer.layout == "nm"
