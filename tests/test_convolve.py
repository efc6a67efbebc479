"""Convolutional networks packed with an example: norms and activations fused, and only where nothing else reads what is between."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pumice
from pumice.core.errors import PumiceError
from pumice.engine import convolve, layer_timing, verdicts
from pumice.kernels import reference
from pumice.weights.modules import SparseConv2d, SparseLinear
from tests.test_kernels import needs_native

pytestmark = pytest.mark.usefixtures("measured_here")


class Net(nn.Module):
    """What networks do around their convolutions, and what must not be fused."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16, affine=False)
        self.conv3, self.bn3, self.relu6 = nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6()
        self.shared = nn.ReLU()
        self.grouped, self.bng, self.inplace = nn.Conv2d(24, 24, 3, groups=4), nn.BatchNorm2d(24), nn.ReLU(inplace=True)
        self.twice, self.bnt = nn.Conv2d(24, 24, 2, padding="same"), nn.BatchNorm2d(24)
        self.conv4, self.bn4 = nn.Conv2d(24, 16, (3, 1), stride=(1, 2)), nn.BatchNorm2d(16)
        self.conv5, self.last = nn.Conv2d(16, 8, 2, padding="same", bias=False), nn.ReLU()
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.pool(self.relu1(self.bn1(self.conv1(x))))
        x = self.shared(self.bn2(self.conv2(x)) + x)
        x = self.relu6(self.bn3(self.conv3(x)))
        x = self.inplace(self.bng(self.grouped(x)))
        x = self.shared(self.bnt(self.twice(x)))
        x = self.twice(x)
        x = self.conv4(x)
        x = self.bn4(x) + x
        x = F.relu(self.conv5(x))
        return self.head(self.last(x - 0.1).mean((2, 3)))


class Branching(nn.Module):
    """A convolution, norm and ReLU, joined by a function of the test."""

    def __init__(self, join):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.other = nn.BatchNorm2d(4)
        self.join = join

    def forward(self, x):
        return self.join(self, x)


def lively(model, density=0.3):
    """Zeros in the convolutions, norms as training leaves them; in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            with torch.no_grad():
                module.weight.mul_(torch.rand_like(module.weight) < density).mul_(1.5)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias)
    return model.eval()


WAYS = [pytest.param("sparse", marks=needs_native), "onednn"]


def clock(fast, monkeypatch):
    """Times that do not depend on the machine: `fast` is the sparse kernels, or a dense backend by its name."""

    def timed(runs):
        for timing, run in runs:
            run()
            kind = timing.backend if timing.layout == "dense" else "sparse"
            timing.ms = 1.0 if kind in (fast, "last") else 2.0

    monkeypatch.setattr(convolve, "time_in_turns", timed)
    monkeypatch.setattr(layer_timing, "time_in_turns", timed)
    # Reading the versions of packages takes longer than the rest.
    monkeypatch.setattr(verdicts, "machine_stamp", dict)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    clock(request.param, monkeypatch)
    return request.param


def packed_net(x, **options):
    """A network, and another one like it, packed."""
    net = lively(Net())
    return net, pumice.pack(copy.deepcopy(net), example=x, progress=False, **options)


def agree(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


SPARSE = ("conv1", "conv2", "conv3", "conv4", "conv5")


@torch.no_grad()
@pytest.mark.parametrize("way", [*WAYS, "torch"])
def test_a_packed_network_computes_the_same(way, monkeypatch):
    clock(way, monkeypatch)
    x = torch.randn(2, 3, 14, 13)
    given = x.clone()
    net, packed = packed_net(x)
    for shape in ((2, 3, 14, 13), (1, 3, 14, 13), (3, 3, 20, 33)):
        other = x if shape == x.shape else torch.randn(shape)
        for _ in range(2):
            agree(packed(other), net(other))
    assert torch.equal(x, given)
    kinds = {name: type(module) for name, module in packed.named_modules() if "conv" in name}
    assert kinds == dict.fromkeys(SPARSE, SparseConv2d if way == "sparse" else nn.Conv2d)
    assert type(packed.twice) is type(packed.grouped) is nn.Conv2d


@torch.no_grad()
def test_other_orders_in_memory_and_types_compute_the_same(way):
    x = torch.randn(2, 3, 14, 13)
    net, packed = packed_net(x)
    last = x.to(memory_format=torch.channels_last)
    agree(packed(last), net(last))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(packed(x), net(x), rtol=5e-2, atol=5e-2 * float(net(x).abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_types_that_no_kernel_takes_run_too(way, dtype):
    x = torch.randn(2, 3, 14, 13)
    net, packed = packed_net(x)
    packed(x)
    for module in packed.modules():
        if isinstance(module, SparseLinear):
            # What pack chose for a linear layer is for one type, and says so in another.
            module.set_backends(None)
    y, wanted = packed.to(dtype)(x.to(dtype)), net.to(dtype)(x.to(dtype))
    assert y.dtype is dtype
    torch.testing.assert_close(y, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))
    agree(packed.float()(x), net.float()(x))


@torch.no_grad()
def test_bfloat16(way):
    x = torch.randn(2, 3, 14, 13)
    net, packed = packed_net(x, values="bfloat16")
    y, wanted = packed(x.bfloat16()), net(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, rtol=5e-2, atol=5e-2 * float(wanted.abs().max()))


def fused(model):
    """Convolution -> the norm and the activation fused into it, by name."""
    names = {id(module): name for name, module in model.named_modules()}
    sites = [
        m.__dict__["forward"].site for m in model.modules() if "forward" in m.__dict__ and hasattr(m.forward, "site")
    ]
    return {names[id(s.module)]: (names.get(id(s.norm)), names.get(id(s.activation))) for s in sites}


def test_what_is_fused_and_what_is_not(monkeypatch):
    clock("torch", monkeypatch)
    _, packed = packed_net(torch.randn(1, 3, 14, 13))
    assert fused(packed) == {
        "conv1": ("bn1", "relu1"),
        "conv2": ("bn2", None),
        "conv3": ("bn3", "relu6"),
        "grouped": ("bng", "inplace"),
        "conv4": (None, None),
        "conv5": (None, None),
    }


def test_names_weights_and_statistics_stay(way):
    x = torch.randn(2, 3, 14, 13)
    net, packed = packed_net(x)
    with torch.no_grad():
        packed(x)
    before, after = net.state_dict(), packed.state_dict()
    held = {name for name in before if type(net.get_submodule(name.rpartition(".")[0])) is nn.BatchNorm2d}
    held |= {"grouped.weight", "grouped.bias", "twice.weight", "twice.bias", "conv2.bias", "conv4.bias"}
    if way != "sparse":
        held |= {f"{name}.weight" for name in SPARSE}
    for name in sorted(held):
        assert torch.equal(after[name], before[name]), name
    assert {name.partition(".")[0] for name in after} == {name.partition(".")[0] for name in before}


def test_unpack_gives_the_ordinary_network_back(way):
    x = torch.randn(2, 3, 14, 13)
    net, packed = packed_net(x)
    back = pumice.unpack(packed)
    assert not any("forward" in module.__dict__ for module in back.modules())
    assert [type(m) for m in back.modules()] == [type(m) for m in net.modules()]
    for (name, ours), theirs in zip(back.state_dict().items(), net.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(back(x), net(x))


def test_who_asks_for_gradients_gets_the_ordinary_ones(way):
    x = torch.randn(2, 3, 14, 13)
    net, packed = packed_net(x)
    for module in packed.modules():
        if isinstance(module, SparseConv2d):
            module.values.requires_grad_()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = packed(ours), net(theirs)
    agree(y.detach(), wanted.detach())
    y.square().sum().backward()
    wanted.square().sum().backward()
    agree(ours.grad, theirs.grad)
    for name in ("bn1.weight", "bn3.bias", "conv2.bias", "grouped.weight", "bng.weight", "head.bias"):
        agree(packed.get_parameter(name).grad, net.get_parameter(name).grad)
    weights = [m for m in packed.modules() if isinstance(m, SparseConv2d)]
    for module in weights:
        name = next(n for n, m in packed.named_modules() if m is module)
        places = reference.positions(module.packed)
        agree(module.values.grad.flatten(), net.get_parameter(f"{name}.weight").grad.flatten()[places])


def test_in_training_norms_follow_the_images(way):
    x = torch.randn(4, 3, 14, 13)
    net, packed = packed_net(x)
    packed.train()
    net.train()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            agree(packed(x).detach(), net(x).detach())
        for name in ("bn1", "bn2", "bng", "bn4"):
            agree(packed.get_submodule(name).running_mean, net.get_submodule(name).running_mean)
            assert packed.get_submodule(name).num_batches_tracked == net.get_submodule(name).num_batches_tracked
    packed.eval()
    net.eval()
    with torch.no_grad():
        agree(packed(x), net(x))


@torch.no_grad()
def test_changes_are_followed(way):
    x = torch.randn(2, 3, 14, 13)
    net, packed = packed_net(x)
    packed(x)

    def both(change):
        before = packed(x)
        change(net)
        change(packed)
        agree(packed(x), net(x))
        assert not torch.allclose(packed(x), before)

    both(lambda model: model.bn1.running_mean.add_(1))
    both(lambda model: model.bn2.running_var.mul_(2))
    both(lambda model: model.bn3.weight.mul_(-1))
    both(lambda model: model.conv2.bias.sub_(0.5))
    both(lambda model: next(model.conv1.parameters()).mul_(0.5))
    both(lambda model: setattr(model.bn1, "bias", nn.Parameter(torch.full((16,), 0.5))))
    held = {name: tensor.clone() + 0.1 for name, tensor in net.state_dict().items() if name.startswith("bn")}
    both(lambda model: model.load_state_dict(held, strict=False))


@torch.no_grad()
def test_a_changed_type_leaves_nothing_stale(way):
    x = torch.randn(2, 3, 14, 13)
    net, packed = packed_net(x)
    packed(x)
    for model in (net, packed):
        model.to(torch.bfloat16).to(torch.float32)
    agree(packed(x), net(x))


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, "saved"])
def test_a_copy_follows_its_own_weights(way, duplicate):
    x = torch.randn(2, 3, 14, 13)
    net, packed = packed_net(x)
    packed(x)
    if duplicate == "saved":
        file = io.BytesIO()
        torch.save(packed, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = duplicate(packed)
    agree(other(x), net(x))
    assert fused(other) == fused(packed)
    for model in (other, changed := copy.deepcopy(net)):
        model.bn1.running_mean.add_(1)
        next(model.conv2.parameters()).zero_()
        model.bng.bias.add_(1)
    agree(other(x), changed(x))
    agree(packed(x), net(x))
    packed.bn3.bias.add_(3)
    agree(other(x), changed(x))


@torch.no_grad()
def test_packing_twice(way, monkeypatch):
    x = torch.randn(2, 3, 14, 13)
    net, packed = packed_net(x)
    for fast in ("sparse", "torch", way):
        clock(fast, monkeypatch)
        packed = pumice.pack(packed, example=x, progress=False, remeasure=True)
        agree(packed(x), net(x))
    assert len(fused(packed)) == 6
    packed = pumice.pack(packed, progress=False)
    agree(packed(x), net(x))


@torch.no_grad()
def test_what_was_measured_is_recalled(monkeypatch):
    x = torch.randn(2, 3, 14, 13)
    clock("onednn", monkeypatch)
    net, packed = packed_net(x)
    monkeypatch.setattr(convolve, "_measure", lambda *_: pytest.fail("measured again"))
    again = pumice.pack(copy.deepcopy(net), example=x, progress=False)
    assert pumice.describe(again).layers == pumice.describe(packed).layers
    agree(again(x), net(x))


def test_real_timing_measures_every_backend_or_gives_its_reason():
    x = torch.randn(1, 3, 14, 13)
    net = lively(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)))
    packed = pumice.pack(copy.deepcopy(net), example=x, progress=False)
    layer = pumice.describe(packed).layers[0]
    assert {(timing.layout == "dense", timing.backend) for timing in layer.timings} >= {
        (True, "torch"),
        (False, "taps"),
    }
    assert all((timing.ms is None) == (timing.reason is not None) for timing in layer.timings)
    with torch.no_grad():
        agree(packed(x), net(x))


def test_each_convolution_is_described_once(way):
    net, packed = packed_net(torch.randn(2, 3, 14, 13))
    layers = [(layer.name.removesuffix(".weight"), layer) for layer in pumice.describe(packed).layers]
    assert sorted(name for name, _ in layers) == sorted([*SPARSE, "grouped", "twice", "head"])
    for name, layer in layers:
        w = net.get_submodule(name).weight
        assert layer.reason
        assert layer.shape == tuple(w.flatten(1).shape)
        assert layer.dense_bytes == 4 * w.numel()
        assert layer.density == pytest.approx(float((w != 0).float().mean()))
        stored = packed.get_submodule(name)
        copied = getattr(stored, "derived_nbytes", 0)
        assert layer.bytes >= (stored.nbytes + copied if isinstance(stored, SparseConv2d) else layer.dense_bytes)
        if name in SPARSE:
            assert (layer.layout != "dense") == (way == "sparse")
            assert set(layer.ms) == set(layer.dense_ms) == {2}


@torch.no_grad()
def test_what_the_caller_and_the_model_hold_is_not_overwritten(way):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third, self.fourth = (nn.ReLU() for _ in range(4))
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.scale = nn.Parameter(torch.randn(1, 3, 1, 1))
            self.register_buffer("shift", torch.randn(1, 3, 8, 8))

        def forward(self, x):
            y = self.conv(self.first(x))
            return y, self.second(y) * self.third(self.scale) + self.fourth(self.shift[:, :, :1])

    net = lively(Holder())
    x = torch.randn(2, 3, 8, 8)
    given, wanted = x.clone(), net(x)
    packed = pumice.pack(copy.deepcopy(net), example=x, progress=False)
    for _ in range(2):
        for ours, theirs in zip(packed(x), wanted, strict=True):
            agree(ours, theirs)
    assert torch.equal(x, given)
    assert torch.equal(packed.scale, net.scale)
    assert torch.equal(packed.shift, net.shift)


@torch.no_grad()
def test_a_layer_with_two_names(way):
    net = lively(Branching(lambda m, x: m.relu(m.bn(m.again(x)))))
    net.again = net.conv
    x = torch.randn(2, 3, 7, 6)
    packed = pumice.pack(copy.deepcopy(net), example=x, progress=False)
    agree(packed(x), net(x))


@torch.no_grad()
def test_norms_without_statistics_and_pools_with_indices_stay(way):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)
            self.pool, self.relu = nn.MaxPool2d(2, return_indices=True), nn.ReLU()

        def forward(self, x):
            y, places = self.pool(self.relu(self.bn(self.conv(x))))
            return y, places

    torch.manual_seed(1)
    net = Odd().eval()
    x = torch.randn(2, 3, 8, 8)
    packed = pumice.pack(copy.deepcopy(net), example=x, progress=False)
    agree(packed(x)[0], net(x)[0])
    assert torch.equal(packed(x)[1], net(x)[1])


def test_packing_in_training_mode_changes_no_statistics(way):
    net = lively(Net()).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items() if name.startswith("bn")}
    packed = pumice.pack(net, example=torch.randn(2, 3, 14, 13), progress=False)
    for name, tensor in before.items():
        assert torch.equal(packed.state_dict()[name], tensor), name
    assert packed.training


@torch.no_grad()
def test_models_without_convolutions_or_parameters_take_an_example(way):
    for net, x in (
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), torch.randn(1, 3, 8, 8)),
        (nn.Sequential(nn.Linear(8, 4), nn.ReLU()), torch.randn(2, 8)),
    ):
        wanted = net(x)
        agree(pumice.pack(net, example=x, progress=False)(x), wanted)


@pytest.mark.parametrize(
    "example", [torch.randn(1, 4, 14, 13), torch.randn(7), "images"], ids=["channels", "1-D", "text"]
)
def test_an_example_that_does_not_fit_is_named(example):
    net = lively(Net())
    with pytest.raises(PumiceError, match="example="):
        pumice.pack(net, example=example, progress=False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@torch.no_grad()
def test_a_packed_network_compiles(way):
    x = torch.randn(2, 3, 14, 13)
    net, packed = packed_net(x)
    agree(torch.compile(packed, backend="eager")(x), net(x))


@torch.no_grad()
@pytest.mark.parametrize("example", [lambda x: {"input": x}, lambda x: (x,)], ids=["mapping", "tuple"])
def test_an_example_comes_as_the_model_takes_it(way, example):
    x = torch.randn(2, 3, 9, 8)
    net = lively(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()))
    packed = pumice.pack(copy.deepcopy(net), example=example(x), values="bfloat16", progress=False)
    y, wanted = packed(x.bfloat16()).float(), net(x)
    torch.testing.assert_close(y, wanted, rtol=5e-2, atol=5e-2 * float(wanted.abs().max()))
    assert isinstance(packed[1].__dict__["forward"], convolve.Passed)


@torch.no_grad()
def test_resnet_of_hugging_face(way):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic", num_labels=5
    )
    net = lively(transformers.ResNetForImageClassification(config))
    x = torch.randn(2, 3, 32, 32)
    packed = pumice.pack(copy.deepcopy(net), example=x, progress=False)
    agree(packed(x).logits, net(x).logits)
    assert any(isinstance(module, SparseConv2d) for module in packed.modules()) == (way == "sparse")
    agree(pumice.unpack(packed)(x).logits, net(x).logits)
