"""Sums and activations of residual blocks in the last step of a convolution, and only where the block's code says so."""

import copy
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pumice
from pumice.core.calls import tensors
from pumice.engine.conv_blocks import FusedBlock
from tests.test_convolve import WAYS, agree, clock, lively

pytestmark = pytest.mark.usefixtures("measured_here")
X = (2, 6, 9, 8)


class Block(nn.Module):
    """Two convolutions, norms and activations, joined by a function of the test."""

    def __init__(self, join):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = (make(6) for make in (conv, nn.BatchNorm2d) * 2)
        self.short, self.down = conv(6, 1), nn.Sequential(conv(6, 1), nn.BatchNorm2d(6))
        self.relu, self.last, self.relu6 = nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6()
        self.none, self.pool = nn.Identity(), nn.AvgPool2d(3, 1, 1)
        self.join, self.flag, self.seen = join, True, None

    def forward(self, x):
        return self.join(self, x)


def conv(channels, kernel=3):
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2)


def with_identity(m, x):
    y = m.bn2(m.conv2(m.relu(m.bn1(m.conv1(x)))))
    y += m.none(x)
    return m.last(y)


def one_relu_for_all(m, x):
    y = m.bn2(m.conv2(m.relu(m.bn1(m.conv1(x)))))
    return m.relu(m.down(x) + y)


def of_functions(m, x):
    y = F.relu(m.bn1(m.conv1(x)), inplace=True)
    return torch.relu(torch.add(x, m.bn2(m.conv2(y))))


def of_methods(m, x):
    return m.bn2(m.conv2(m.bn1(m.conv1(x)).relu_())).add_(x).relu()


def up_to_six(m, x):
    return m.relu6(F.relu6(m.conv2(m.conv1(x)) + x) + m.short(x))


def without_activation(m, x):
    x = m.pool(x)
    return m.conv2(m.relu(m.bn1(m.conv1(x)))) + x


MERGED = (with_identity, one_relu_for_all, of_functions, of_methods, up_to_six, without_activation)


class Ops(TorchDispatchMode):
    """Operations of PyTorch that ran, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def ops(model, x):
    with torch.no_grad(), Ops() as seen:
        model(x)
    return seen.count


def packed_block(join, x=None, seed=0):
    torch.manual_seed(seed)
    net = lively(nn.Sequential(Block(join)))
    x = torch.randn(X) if x is None else x
    return net, pumice.pack(copy.deepcopy(net), example=x, progress=False), x


def blocks(model):
    return [name for name, m in model.named_modules() if isinstance(m.__dict__.get("forward"), FusedBlock)]


def taken(model, x):
    """Whether the program stands for the module's own code."""
    forward = model.__dict__["forward"]
    before, given = forward.run, []
    if before is None:
        return False
    forward.run = lambda x: given.append(x) or before(x)
    try:
        model(x)
    finally:
        forward.run = before
    return bool(given)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    clock(request.param, monkeypatch)
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("join", MERGED)
def test_sums_and_activations_go_into_the_convolution(join, way):
    net, packed, x = packed_block(join)
    given = x.clone()
    assert blocks(packed) == [""]
    for shape in (X, (1, 6, 5, 4), (3, 6, 20, 33)):
        other = x if shape == X else torch.randn(shape)
        for _ in range(2):
            agree(packed(other), net(other))
    assert torch.equal(x, given)
    if way == "sparse":
        assert not {"add", "add_", "relu", "relu_", "clamp", "hardtanh"} & set(ops(packed, x))
    agree(pumice.unpack(packed)(x), net(x))
    assert blocks(packed) == []


@torch.no_grad()
@pytest.mark.parametrize("join", MERGED)
def test_bfloat16(join, way):
    net, packed, x = packed_block(join)
    packed = pumice.pack(copy.deepcopy(net), example=x, values="bfloat16", progress=False)
    assert blocks(packed) == [""]
    y, wanted = packed(x.bfloat16()).float(), net(x)
    torch.testing.assert_close(y, wanted, rtol=5e-2, atol=3e-2 * float(wanted.abs().max()))


def read_after_the_sum(m, x):
    y = m.conv2(x)
    z = y + x
    return m.relu(z) - z


def read_before_the_sum(m, x):
    y = m.conv2(x)
    return m.relu(y + x) - y


def of_two_alike(m, x):
    y = m.conv2(x)
    return m.relu(y + y)


def of_a_number(m, x):
    return m.relu(m.conv2(x) + 1)


def scaled(m, x):
    return m.relu(torch.add(m.conv2(x), x, alpha=2))


def smaller(m, x):
    return m.relu(m.conv2(x) + x.mean((2, 3), keepdim=True))


def larger(m, x):
    return m.relu(m.conv2(x) + x[None])


def wider(m, x):
    return m.relu(m.conv2(x) + x.double())


def summed_later(m, x):
    y = m.conv2(x)
    x = x * 2
    return m.relu(y + x)


def changed_between(m, x):
    x = x.clone()
    y = m.conv2(x)
    x.add_(1)
    return m.relu(y + x)


def changed_in_place_between(m, x):
    z = x.clone()
    y = m.bn2(m.conv2(z))
    x = m.last(z)
    return m.relu(y + x)


def added_to_what_was_given(m, x):
    y = m.conv2(x)
    x += y
    return m.relu(m.short(x) + y)


def added_to_what_is_read_later(m, x):
    z = x * 2
    y = m.relu(z.add_(m.conv2(x)))
    return y - z


def viewed(m, x):
    y = m.conv2(x)
    return m.relu(y[:, :3]) + m.relu(y[:, 3:] + x[:, 3:])


def reads_settings(m, x):
    y = m.conv2(x)
    return m.relu(y + x if m.flag else y - x)


ODD = (
    read_after_the_sum, read_before_the_sum, of_two_alike, of_a_number, scaled, smaller, larger, wider, summed_later,
    changed_between, changed_in_place_between, added_to_what_was_given, added_to_what_is_read_later, viewed, reads_settings,
)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("join", ODD)
def test_whatever_the_code_does_comes_out(join, way):
    net, packed, x = packed_block(join)
    for shape in (X, (1, 6, 12, 7)):
        other = x if shape == X else torch.randn(shape)
        for _ in range(2):
            ours, theirs = other.clone(), other.clone()
            agree(packed(ours), net(theirs))
            # What the code changes in place is changed, and nothing else.
            agree(ours, theirs)


def keeps_an_output(m, x):
    m.seen = m.conv2(x)
    return m.relu(m.seen + x)


def counts_its_calls(m, x):
    m.seen = (m.seen or 0) + 1
    return m.relu(m.conv2(x) + x)


def asks_for_numbers(m, x):
    y = m.conv2(x)
    return m.relu(y + x) if y.sum() > 0 else m.relu(y - x)


def asks_what_it_is_given(m, x):
    y = m.conv2(x)
    return m.relu(y + x) if isinstance(x, torch.Tensor) else m.relu(y - x)


def gives_two(m, x):
    y = m.relu(m.conv2(x) + x)
    return y, x


LEFT = (keeps_an_output, counts_its_calls, asks_for_numbers, asks_what_it_is_given, gives_two)


@torch.no_grad()
@pytest.mark.parametrize("join", LEFT)
def test_what_a_program_would_not_do_is_left_to_the_code(join, way):
    net, packed, x = packed_block(join)
    assert blocks(packed) == []
    assert packed[0].seen is None or isinstance(packed[0].seen, int | torch.Tensor)
    before = packed[0].seen
    for ours, theirs in zip(tensors(packed(x)), tensors(net(x)), strict=True):
        agree(ours, theirs)
    if join in (keeps_an_output, counts_its_calls):
        assert packed[0].seen is not before


@torch.no_grad()
def test_a_list_that_is_filled_gives_the_block_away(way):
    kept = []
    net, packed, x = packed_block(lambda m, x: m.relu(m.conv2(x) + (kept.append(x) or x)))
    assert blocks(packed) == []
    agree(packed(x), net(x))


@torch.no_grad()
def test_what_is_inside_of_a_module_that_cannot_be_traced_is_taken(way):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Block(with_identity), Block(of_functions))
            self.more = nn.ModuleList([Block(one_relu_for_all)])

        def forward(self, x, mask=None):
            x = self.blocks(x)
            x = x if mask is None else x * mask
            return {"out": self.more[0](x)}

    net = lively(Odd())
    x = torch.randn(X)
    packed = pumice.pack(copy.deepcopy(net), example=x, progress=False)
    assert blocks(packed) == ["blocks", "more.0"]
    agree(packed(x)["out"], net(x)["out"])
    mask = torch.rand(X) < 0.5
    agree(packed(x, mask)["out"], net(x, mask)["out"])


def test_gradients_graphs_and_training_are_the_codes_own(way):
    net, packed, x = packed_block(with_identity)
    assert packed(x).requires_grad
    with torch.no_grad():
        assert taken(packed, x)
        agree(torch.compile(packed, backend="eager")(x), net(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert not taken(packed, x)
        packed.train()
        assert not taken(packed, x)
        packed.eval()
        for name in ("bn1", "bn2"):
            packed[0].get_submodule(name).load_state_dict(net[0].get_submodule(name).state_dict())
        agree(packed(x), net(x))
        assert taken(packed, x)


@torch.no_grad()
def test_hooks_are_told(way):
    net, packed, x = packed_block(with_identity)
    seen = []
    handle = packed[0].bn2.register_forward_hook(lambda *_: seen.append(1))
    agree(packed(x), net(x))
    assert seen == [1]
    handle.remove()
    agree(packed(x), net(x))
    assert seen == [1]
    assert taken(packed, x)


@torch.no_grad()
def test_changes_are_followed(way):
    net, packed, x = packed_block(reads_settings)
    assert taken(packed, x)
    for model in (net, packed):
        model[0].conv2.bias.add_(1)
    agree(packed(x), net(x))
    assert taken(packed, x)
    for model in (net, packed):
        model[0].flag = False
    agree(packed(x), net(x))
    for model in (net, packed):
        model[0].flag = True
    agree(packed(x), net(x))
    assert taken(packed, x)
    for model in (net, packed):
        model[0].relu = nn.Tanh()
    agree(packed(x), net(x))
    torch.manual_seed(3)
    new = conv(6)
    for model in (net, packed):
        model[0].conv2 = new
    agree(packed(x), net(x))


@torch.no_grad()
def test_other_types_than_it_was_packed_in(way):
    net, packed, x = packed_block(with_identity)
    agree(packed.double()(x.double()), net.double()(x.double()))
    agree(packed.float()(x), net.float()(x))
    assert taken(packed, x)


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_follows_its_own_weights(way, duplicate):
    net, packed, x = packed_block(one_relu_for_all)
    packed(x)
    other = duplicate(packed)
    packed[0].bn2.bias.add_(1)
    agree(other(x), net(x))
    assert taken(other, x)
    assert other.forward.module is other
    other[0].conv1.bias.add_(1)
    net[0].conv1.bias.add_(1)
    agree(other(x), net(x))
