"""`SparseConv2d` stands in for an ordinary convolution: same numbers, same gradients, nothing stale after any change."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pumice.core import dispatch
from pumice.core.errors import PumiceError
from pumice.kernels import conv_cpu, reference
from pumice.weights.layouts import base
from pumice.weights.modules import SparseConv2d
from tests.test_conv_kernels import DTYPES, LAYOUTS, close, nbytes
from tests.test_kernels import mask_of, needs_native

pytestmark = pytest.mark.usefixtures("one_thread")


def convolution(channels=8, outputs=16, kernel=3, layout="csr", dtype=torch.float32, params=None, **settings):
    """An ordinary convolution with zeros, and its sparse twin."""
    dense = nn.Conv2d(channels, outputs, kernel, **settings).to(dtype)
    flat = dense.weight.flatten(1)
    params = LAYOUTS[layout] if params is None else params
    with torch.no_grad():
        dense.weight.mul_(mask_of(layout, *flat.shape, params, 0.4).view_as(dense.weight))
    packed = base.pack(dense.weight.detach().flatten(1), layout, **params)
    dense.requires_grad_(False)
    return dense, SparseConv2d.from_module(copy.deepcopy(dense), packed)


SETTINGS = {
    "3x3": {"padding": 1},
    "strided": {"padding": 1, "stride": 2},
    "even same": {"kernel": 2, "padding": "same"},
    "1x1": {"kernel": 1},
    "1x1 strided": {"kernel": 1, "stride": 2},
    "no bias": {"bias": False},
    "groups": {"groups": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular same": {"padding": "same", "padding_mode": "circular"},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SETTINGS)
def test_the_module_computes_as_the_ordinary_one(case, dtype):
    dense, sparse = convolution(dtype=dtype, **SETTINGS[case])
    dense.double()
    for shape in ((2, 8, 9, 7), (8, 9, 7), (1, 8, 12, 33)):
        x = torch.randn(shape).to(dtype)
        for _ in range(2):
            close(sparse(x), dense(x.double()), dtype)
    x = torch.randn(3, 8, 9, 7).to(dtype).to(memory_format=torch.channels_last)
    close(sparse(x), dense(x.double()), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_masked_dense_one(layout):
    for kernel, padding in ((3, 1), (1, 0)):
        dense, sparse = convolution(kernel=kernel, padding=padding, layout=layout)
        places = reference.positions(sparse.packed)
        dense.requires_grad_()
        sparse.requires_grad_()
        x = torch.randn(2, 8, 6, 5)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        found = torch.autograd.grad(sparse(ours).square().sum(), (ours, sparse.values, sparse.bias))
        wanted = torch.autograd.grad(dense(theirs).square().sum(), (theirs, dense.weight, dense.bias))
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found[1].flatten(), wanted[1].flatten()[places], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found[2], wanted[2], rtol=1e-4, atol=1e-3)


@needs_native
def test_the_kernel_runs_where_no_gradients_are_asked_for(monkeypatch):
    calls = []
    backend = dispatch.get("conv2d", "csr", "taps")

    def prepare(packed, bias):
        run = backend.prepare(packed, bias)
        return lambda x, how: (calls.append(tuple(x.shape)), run(x, how))[1]

    key = ("conv2d", "csr", "taps")
    monkeypatch.setitem(dispatch._backends, key, dispatch.Backend("taps", *key[:2], backend.refuse, prepare, 30))
    for kernel in (3, 1):
        _, sparse = convolution(kernel=kernel)
        sparse.values.requires_grad_()
        x = torch.randn(1, 8, 5, 5)
        with torch.enable_grad():
            sparse(x)
        assert not calls
        with torch.no_grad():
            sparse(x)
        assert calls == [(1, 8, 5, 5)]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            sparse(x)
        assert len(calls) == 1
        with torch.inference_mode():
            sparse(x)
        assert len(calls) == 2
        calls.clear()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_of_training_is_followed(layout):
    for kernel in (3, 1):
        _, sparse = convolution(kernel=kernel, layout=layout)
        sparse.values.requires_grad_()
        sparse.bias.requires_grad_()
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
        x = torch.randn(2, 8, 6, 5)
        for _ in range(2):
            with torch.no_grad():
                before = sparse(x)
            optimizer.zero_grad()
            sparse(x).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                after = sparse(x)
                assert not torch.allclose(before, after)
                close(after, F.conv2d(x, sparse.weight, sparse.bias))
                sparse.values.mul_(2)
                close(sparse(x), F.conv2d(x, sparse.weight, sparse.bias))


def test_images_and_pixels_by_turns():
    """The kernels for convolutions and for linear layers each keep a copy that is made from the same values."""
    for layout in LAYOUTS:
        dense, sparse = convolution(kernel=1, layout=layout)
        x = torch.randn(2, 8, 6, 5)
        for _ in range(2):
            close(sparse(x), dense(x))
            close(sparse(x[0]), dense(x[0]))


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda s: pickle.loads(pickle.dumps(s)),
        lambda s: s.to(torch.float64).to(torch.float32),
        lambda s: (s.load_state_dict({k: v.clone() for k, v in s.state_dict().items()}), s)[1],
        lambda s: (s.load_state_dict({k: v.clone() for k, v in s.state_dict().items()}, assign=True), s)[1],
    ],
    ids=["deepcopy", "pickle", "to", "load", "load assign"],
)
def test_nothing_stale_after(change):
    dense, sparse = convolution(padding=1, layout="bitmask")
    x = torch.randn(2, 8, 6, 5)
    close(sparse(x), dense(x))
    other = change(sparse)
    close(other(x), dense(x))
    with torch.no_grad():
        other.values.mul_(2)
        other.bias.mul_(2)
    close(other(x), 2 * dense(x))
    if other is not sparse:
        close(sparse(x), dense(x))


@torch.no_grad()
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)], ids=str)
def test_numbers_where_others_stood_in_memory_are_noticed(types):
    for _ in range(10):
        dense, sparse = convolution()
        x = torch.randn(1, 8, 5, 5)
        sparse(x)
        for dtype in types:
            dense, sparse = dense.to(dtype), sparse.to(dtype)
        close(sparse(x.to(dtype)), dense.double()(x.to(dtype).double()), dtype)


def test_replaced_parameters_are_noticed():
    dense, sparse = convolution()
    x = torch.randn(2, 8, 6, 5)
    close(sparse(x), dense(x))
    sparse.bias = nn.Parameter(torch.zeros(16), requires_grad=False)
    close(sparse(x), F.conv2d(x, dense.weight))
    sparse.values = nn.Parameter(torch.zeros_like(sparse.values), requires_grad=False)
    assert not sparse(x).any()


def test_autocast_acts_as_on_an_ordinary_one():
    for kernel in (3, 1):
        dense, sparse = convolution(kernel=kernel)
        x = torch.randn(2, 8, 6, 5)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert sparse(x).dtype == dense(x).dtype == torch.bfloat16
            torch.testing.assert_close(sparse(x), dense(x), rtol=2e-2, atol=2e-2)
        close(sparse(x), dense(x))


@pytest.mark.parametrize("case", ["3x3", "strided", "1x1", "groups", "reflect"])
def test_compiles_without_a_break(case):
    dense, sparse = convolution(**SETTINGS[case])
    x = torch.randn(2, 8, 6, 5)
    with torch.no_grad():
        close(torch.compile(sparse, backend="eager", fullgraph=True)(x), dense(x))


@needs_native
def test_bytes_of_the_copy_are_told():
    _, sparse = convolution()
    assert sparse.derived_nbytes == 0
    sparse(torch.randn(1, 8, 5, 5))
    assert sparse.derived_nbytes == nbytes(conv_cpu.taps_of(sparse.packed))


def test_damaged_state_is_refused_before_a_kernel_reads_it():
    _, sparse = convolution()
    state = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    state["columns"].fill_(5000)
    sparse.load_state_dict(state)
    with pytest.raises(PumiceError):
        sparse(torch.randn(1, 8, 5, 5))
