"""Sparse modules stand in for dense ones: same numbers, same interface, and nothing stale after any change."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pumice.core import dispatch, registry
from pumice.core.errors import PumiceError
from pumice.kernels import cpu_backend
from pumice.weights.layouts.base import pack
from pumice.weights.modules import SparseConv2d, SparseLinear, sparse_twin
from tests.conformance.test_layouts import CODED, codings, n_of_m, on_grid

PARAMS = {info.name: info.obj.examples[0] for info in registry.family("layout").members()}


def linear(name="bitmask", o=32, i=64, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    dense = nn.Linear(i, o, bias=bias).to(dtype)
    with torch.no_grad():
        w, grid = on_grid(n_of_m(o, i, 1, 4), codings(name, PARAMS[name])[0])
        dense.weight.copy_(w)
    dense.requires_grad_(False)
    return dense, SparseLinear.from_module(dense, pack(dense.weight, name, grid=grid, **PARAMS[name]))


def close(a, b, dtype=torch.float32):
    torch.testing.assert_close(
        a, b, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=3e-2 if dtype != torch.float32 else 1e-5
    )


@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 64), (2, 3, 64), (2, 0, 64), (2, 2, 2, 64)], ids=str)
@pytest.mark.parametrize("name", PARAMS)
def test_same_output_as_dense(name, shape):
    for dtype in (torch.float32, torch.bfloat16):
        for bias in (True, False):
            dense, sparse = linear(name, bias=bias, dtype=dtype)
            x = torch.randn(shape, dtype=dtype)
            y = sparse(x)
            assert y.dtype == dtype
            assert y.shape == dense(x).shape
            close(y, dense(x), dtype)
            close(sparse(x), dense(x), dtype)


@pytest.mark.parametrize("name", PARAMS)
def test_looks_like_a_linear_and_turns_back_into_one(name):
    dense, sparse = linear(name)
    assert (sparse.in_features, sparse.out_features) == (64, 32)
    assert torch.equal(sparse.weight, dense.weight)
    assert sparse.weight.dtype == torch.float32
    back = sparse.to_dense()
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, dense.weight)
    assert torch.equal(back.bias, dense.bias)
    assert name in repr(sparse)
    assert str(sparse.nbytes) in repr(sparse)
    assert set(sparse.state_dict()) == {*sparse.packed.tensors, "bias"}
    assert not any(p.requires_grad for p in sparse.parameters())


def test_weight_cannot_be_set():
    _, sparse = linear()
    with pytest.raises(PumiceError, match="from_module"):
        sparse.weight = nn.Parameter(torch.zeros(32, 64))


@pytest.mark.parametrize("name", [name for name in PARAMS if name not in CODED])
def test_gradients_reach_values_and_input(name):
    dense, sparse = linear(name)
    mask = sparse.weight != 0
    dense.requires_grad_(True)
    sparse.requires_grad_(True)
    x = torch.randn(4, 64)
    xs, xd = x.clone().requires_grad_(), x.clone().requires_grad_()
    g = torch.randn(4, 32)
    sparse(xs).backward(g)
    dense(xd).backward(g)
    close(xs.grad, xd.grad)
    close(sparse.bias.grad, dense.bias.grad)
    grad = sparse.get_parameter(sparse.packed.value_name).grad
    carried = sparse.packed
    carried.tensors[carried.value_name] = grad
    expected = torch.where(mask, dense.weight.grad, 0)
    from pumice.weights.layouts.base import unpack

    close(torch.where(mask, unpack(carried), 0), expected)


def test_training_step_changes_what_runs():
    _, sparse = linear()
    x = torch.randn(3, 64)
    before = sparse(x)
    sparse.values.requires_grad_(True)
    sparse(x).square().sum().backward()
    torch.optim.SGD([sparse.values], lr=0.1).step()
    with torch.no_grad():
        after = sparse(x)
    assert not torch.allclose(before, after)
    close(after, x @ sparse.weight.detach().t() + sparse.bias)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.to(torch.float64).to(torch.float32),
        lambda s: copy.deepcopy(s),
        lambda s: pickle.loads(pickle.dumps(s)),
        lambda s: (s.load_state_dict({k: v.clone() for k, v in s.state_dict().items()}), s)[1],
        lambda s: (s.load_state_dict({k: v.clone() for k, v in s.state_dict().items()}, assign=True), s)[1],
    ],
    ids=["to", "deepcopy", "pickle", "load", "load assign"],
)
def test_nothing_stale_after(change):
    _, sparse = linear()
    x = torch.randn(3, 64)
    y = sparse(x)
    other = change(sparse)
    close(other(x), y)
    with torch.no_grad():
        other.values.mul_(2)
        other.bias.mul_(2)
    close(other(x), 2 * y)


def test_a_copy_is_independent():
    _, sparse = linear()
    x = torch.randn(3, 64)
    y = sparse(x)
    other = copy.deepcopy(sparse)
    with torch.no_grad():
        other.values.zero_()
    close(sparse(x), y)


def test_replaced_parameter_is_noticed():
    _, sparse = linear()
    x = torch.randn(3, 64)
    sparse(x)
    sparse.values = nn.Parameter(torch.zeros_like(sparse.values), requires_grad=False)
    close(sparse(x), sparse.bias.expand(3, -1))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_changes_in_place_are_noticed(dtype):
    w = torch.randn(48, 64) * (torch.rand(48, 64) < 0.2)
    w[:, 63] = 0
    sparse, x = SparseLinear(pack(w.to(dtype), "csr"), torch.randn(48).to(dtype)), torch.randn(3, 64).to(dtype)

    def same():
        wanted = F.linear(x.double(), sparse.weight.double(), sparse.bias.double())
        torch.testing.assert_close(sparse(x).double(), wanted, rtol=2e-2, atol=2e-2)

    same()
    sparse.bias.add_(1)
    same()
    sparse.columns.copy_((sparse.columns.int() + 1).to(sparse.columns.dtype))
    same()
    sparse.values.mul_(2)
    same()
    sparse.columns.fill_(64)
    with pytest.raises(PumiceError, match="damaged"):
        sparse(x)


def test_damaged_state_is_refused_before_a_kernel_reads_it():
    _, sparse = linear()
    state = {k: v.clone() for k, v in sparse.state_dict().items()}
    state["bitmask"][:] = 255
    sparse.load_state_dict(state)
    with pytest.raises(PumiceError, match="damaged"):
        sparse(torch.randn(1, 64))


def test_wrong_input_is_named():
    _, sparse = linear()
    with pytest.raises(PumiceError, match="64 inputs"):
        sparse(torch.randn(2, 32))
    with pytest.raises(PumiceError, match="float64"):
        sparse(torch.randn(2, 64, dtype=torch.float64))


def test_autocast_acts_as_on_a_linear():
    dense, sparse = linear()
    x = torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert sparse(x).dtype == dense(x).dtype == torch.bfloat16
        close(sparse(x), dense(x), torch.bfloat16)


def test_inference_mode_tensors():
    with torch.inference_mode():
        dense, sparse = linear()
        x = torch.randn(3, 64)
        close(sparse(x), dense(x))
        close(sparse(x), dense(x))


def test_plan_chooses_by_rows():
    calls = []

    def counted(name):
        def prepare(packed, bias):
            run = dispatch.get("linear", "bitmask", "unpack").prepare(packed, bias)
            return lambda x: (calls.append((name, len(x))), run(x))[1]

        return dispatch.Backend(name, "linear", "bitmask", lambda call: None, prepare, priority=-1000)

    few, many = dispatch.register(counted("test-few")), dispatch.register(counted("test-many"))
    try:
        dense, sparse = linear()
        sparse.set_backends([(4, "test-few"), (None, "test-many")])
        for rows in (1, 4, 5, 1):
            x = torch.randn(rows, 64)
            close(sparse(x), dense(x))
        assert calls == [("test-few", 1), ("test-few", 4), ("test-many", 5), ("test-few", 1)]
        assert copy.deepcopy(sparse).plan == sparse.plan
        sparse.set_backends(None)
        sparse(torch.randn(1, 64))
        assert len(calls) == 4
    finally:
        for backend in (few, many):
            dispatch._backends.pop((backend.op, backend.layout, backend.name))


def test_bad_plans():
    _, sparse = linear()
    for plan in ([], [(None, "unpack"), (4, "unpack")], [(4, "unpack"), (4, "unpack")]):
        with pytest.raises(PumiceError, match="plan="):
            sparse.set_backends(plan)
    with pytest.raises(PumiceError, match="unknown backend"):
        sparse.set_backends([(None, "nothing")])


def test_compiles_without_a_break():
    dense, sparse = linear()
    x = torch.randn(3, 64)
    close(torch.compile(sparse, backend="eager", fullgraph=True)(x), dense(x))


def test_exports():
    dense, sparse = linear()
    x = torch.randn(3, 64)
    close(torch.export.export(sparse, (x,)).module()(x), dense(x))


CONVS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 8},
    "grouped 1x1": {"kernel_size": 1, "groups": 2},
    "dilated": {"kernel_size": 3, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "1x1": {"kernel_size": 1},
    "1x1 padded": {"kernel_size": 1, "padding": 1},
    "1x1 strided": {"kernel_size": 1, "stride": 2},
    "no bias": {"kernel_size": 1, "bias": False},
}


@pytest.mark.parametrize("case", CONVS)
def test_convolutions(case):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, **CONVS[case])
    with torch.no_grad():
        conv.weight.mul_(torch.rand_like(conv.weight) < 0.4)
    sparse = SparseConv2d.from_module(conv, pack(conv.weight.flatten(1), "bitmask"))
    for shape in ((2, 8, 9, 7), (8, 9, 7)):
        x = torch.randn(shape)
        with torch.no_grad():
            close(sparse(x), conv(x))
    close(sparse(x), conv(x))
    assert torch.equal(sparse.weight, conv.weight)
    back = sparse.to_dense()
    assert type(back) is nn.Conv2d
    assert torch.equal(back(x), conv(x))
    assert back.weight.is_contiguous()
    kernel = cpu_backend.native is not None and case not in {"depthwise", "grouped 1x1", "reflect"}
    assert sparse.runs_sparse == (kernel or case in {"1x1", "no bias"})
    assert set(sparse.state_dict()) == {"values", "bitmask"} | ({"bias"} if conv.bias is not None else set())
    assert "bytes, not time" in repr(sparse) or sparse.runs_sparse
    copy.deepcopy(sparse)(x)
    torch.save(sparse, io.BytesIO())


def test_gpt2_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(32, 64)
    with torch.no_grad():
        conv1d.weight.mul_(torch.rand_like(conv1d.weight) < 0.5)
    sparse = SparseLinear.from_module(conv1d, pack(conv1d.weight.detach().t(), "bitmask"))
    x = torch.randn(2, 3, 64)
    close(sparse(x), conv1d(x))
    assert torch.equal(sparse.weight, conv1d.weight)
    assert (sparse.nf, sparse.nx) == (32, 64)
    back = sparse.to_dense()
    assert type(back) is type(conv1d)
    assert torch.equal(back(x), conv1d(x))
    assert back.weight.is_contiguous()


def test_only_what_can_be_replaced_is():
    packed = pack(torch.zeros(4, 8), "bitmask")
    with pytest.raises(PumiceError, match="belongs to another layer"):
        SparseLinear.from_module(nn.Linear(9, 4), packed)
    with pytest.raises(PumiceError, match="neither Linear nor Conv1D"):
        SparseLinear.from_module(nn.LayerNorm(8), packed)
    with pytest.raises(PumiceError, match="no Conv2d"):
        SparseConv2d.from_module(nn.Linear(8, 4), packed)
    assert sparse_twin(nn.Linear(8, 4)) is SparseLinear
    assert sparse_twin(nn.Conv2d(8, 4, 1)) is SparseConv2d
    assert sparse_twin(nn.Conv1d(8, 4, 1)) is None


def test_meta_module_takes_a_state_dict():
    from pumice.weights.layouts.base import Packed

    _, sparse = linear()
    empty = SparseLinear(Packed.empty(sparse.packed.describe()), nn.Parameter(torch.empty(32, device="meta")))
    empty.load_state_dict(sparse.state_dict(), assign=True)
    x = torch.randn(2, 64)
    close(empty(x), sparse(x))
