"""Every layout of the registry stores and gives back any matrix it accepts, exactly, and knows its size beforehand."""

import itertools
import math

import pytest
import torch

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.weights.layouts.base import Packed, pack, pack_bits, pack_smallest, unpack, unpack_bits, validate
from pumice.weights.layouts.nm import rank, unrank

LAYOUTS = [info.name for info in registry.family("layout").members()]
PARAMS = {info.name: info.obj.examples for info in registry.family("layout").members()}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class Hint:
    def __init__(self, layout, **params):
        self.wanted = (layout, params)

    def storage(self, o, i):
        return self.wanted


def half(o, i, dtype=torch.float32, density=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(o, i, generator=g) * (torch.rand(o, i, generator=g) < density)
    return w.to(dtype)


def n_of_m(o, i, n, m, dtype=torch.float32):
    w = torch.randn(o, i // m, m, generator=torch.Generator().manual_seed(1))
    w[..., n:] = 0
    order = torch.rand(w.shape, generator=torch.Generator().manual_seed(2)).argsort(-1)
    return w.gather(-1, order).flatten(1).to(dtype)


def matrices(dtype):
    yield "random half", half(48, 64, dtype)
    yield "odd width", half(5, 37, dtype)
    yield "2:4", n_of_m(32, 64, 2, 4, dtype)
    yield "all zero", torch.zeros(16, 32, dtype=dtype)
    yield "full", torch.ones(16, 32, dtype=dtype)
    yield "no rows", torch.zeros(0, 32, dtype=dtype)
    yield "no columns", torch.zeros(16, 0, dtype=dtype)
    yield "one", torch.full((1, 1), 3.0, dtype=dtype)
    odd = n_of_m(16, 32, 2, 4, dtype)
    odd[odd == 0] = -0.0
    odd.view(-1)[int((odd != 0).flatten().nonzero()[0])] = math.nan
    odd.view(-1)[int((odd != 0).flatten().nonzero()[1])] = -math.inf
    yield "negative zeros, NaN, Inf", odd
    yield "not contiguous", half(64, 48, dtype).t()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_round_trip_is_exact_and_size_is_known_beforehand(name, dtype):
    accepted = 0
    for (what, w), params in itertools.product(matrices(dtype), PARAMS[name]):
        cls = registry.layout.get(name).obj
        if cls.refuse(w, **params):
            continue
        accepted += 1
        packed = pack(w, name, **params)
        back = unpack(packed)
        assert (back.dtype, back.shape) == (dtype, w.shape), what
        assert torch.allclose(back, w, rtol=0, atol=0, equal_nan=True), what
        assert packed.nbytes == cls.stored_bytes(w, **params), what
        assert sum(t.is_floating_point() for t in packed.tensors.values()) == 1
        validate(packed)
    assert accepted >= 3


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "dense"])
def test_negative_zero_is_a_zero(name):
    w = torch.full((16, 32), -0.0)
    w[0, 0] = 1
    back = unpack(pack(w, name, **PARAMS[name][0]))
    assert not torch.signbit(back).any()


@pytest.mark.parametrize("name", LAYOUTS)
def test_description_rebuilds_the_empty_tensors(name):
    packed = pack(n_of_m(32, 64, 1, 4, torch.bfloat16), name, **PARAMS[name][0])
    again = Packed.empty(packed.describe())
    assert again.specs() == packed.specs()
    assert again.params == packed.params
    assert again.shape == packed.shape
    assert again.device.type == "meta"
    assert torch.equal(unpack(packed.astype(torch.float32)), unpack(packed).float())


@pytest.mark.parametrize("name", LAYOUTS)
def test_tensors_go_through_safetensors(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    packed = pack(n_of_m(32, 64, 1, 4), name, **PARAMS[name][0])
    safetensors.save_file(packed.tensors, tmp_path / "t.safetensors")
    packed.tensors = safetensors.load_file(tmp_path / "t.safetensors")
    validate(packed)
    assert torch.equal(unpack(packed), n_of_m(32, 64, 1, 4))


@pytest.mark.parametrize("name", LAYOUTS)
def test_damage_is_noticed(name):
    packed = pack(n_of_m(32, 64, 1, 4), name, **PARAMS[name][0])
    for key in packed.tensors:
        broken = Packed(packed.layout, packed.shape, packed.dtype, dict(packed.tensors), packed.params)
        broken.tensors[key] = packed.tensors[key][:-1]
        with pytest.raises(PumiceError, match="damaged"):
            validate(broken)
        del broken.tensors[key]
        with pytest.raises(PumiceError, match="missing"):
            validate(broken)


@pytest.mark.parametrize(
    ("name", "tensor", "value"),
    [
        ("bitmask", "bitmask", 255),
        ("csr", "columns", 64),
        ("csr", "row_starts", 1),
        ("block", "columns", 8),
        ("nm", "codes", 255),
    ],
)
def test_positions_out_of_range_are_noticed(name, tensor, value):
    params = {"nm": {"n": 2, "m": 4}, "block": {"r": 4, "c": 8}}.get(name, {})
    packed = pack(n_of_m(32, 64, 2, 4), name, **params)
    packed.tensors[tensor].view(-1)[0] = value
    with pytest.raises(PumiceError, match="damaged"):
        validate(packed)


def test_half_of_bf16_takes_at_most_57_percent():
    w = half(512, 576, torch.bfloat16)
    packed = pack_smallest(w)
    assert packed.layout == "bitmask"
    assert packed.nbytes <= 0.57 * packed.dense_nbytes


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (2, 8)])
def test_smallest_finds_n_of_m_unhinted(n, m):
    packed = pack_smallest(n_of_m(64, 64, n, m, torch.bfloat16))
    assert packed.layout == "nm"
    assert packed.params == {"n": n, "m": m}


def test_smallest_takes_hints():
    assert pack_smallest(n_of_m(64, 60, 3, 10), Hint("nm", n=3, m=10)).params == {"n": 3, "m": 10}
    w = torch.randn(40, 60)
    w.view(8, 5, 10, 6)[:, :, ::2] = 0
    packed = pack_smallest(w, Hint("block", r=5, c=6))
    assert packed.layout == "block"
    assert packed.params == {"r": 5, "c": 6}
    assert torch.equal(unpack(packed), w)


def test_smallest_by_density():
    assert pack_smallest(torch.randn(64, 64)).layout == "dense"
    assert pack_smallest(half(256, 999, density=0.02)).layout == "csr"
    assert pack_smallest(torch.zeros(0, 7)).nbytes == 0


@pytest.mark.parametrize("seed", range(8))
def test_smallest_is_the_smallest(seed):
    w = half(64, 96, torch.bfloat16, density=[0.9, 0.7, 0.5, 0.3, 0.1, 0.05, 0.01, 0.99][seed], seed=seed)
    chosen = pack_smallest(w)
    assert torch.equal(unpack(chosen), w)
    for info in registry.layout.members():
        for params in info.obj.candidates(w):
            if info.obj.refuse(w, **params) is None:
                assert chosen.nbytes <= pack(w, info.name, **params).nbytes


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 4), (4, 8), (3, 7), (8, 16)])
def test_ranks_count_all_choices_without_gaps(n, m):
    count = math.comb(m, n)
    masks = unrank(torch.arange(count), n, m)
    assert (masks.sum(-1) == n).all()
    assert torch.equal(rank(masks), torch.arange(count))
    assert len({tuple(row) for row in masks.tolist()}) == count


def test_ranks_of_wide_groups():
    mask = torch.zeros(50, 32, dtype=torch.bool)
    mask[:, :16] = True
    mask = mask.gather(1, torch.rand(50, 32, generator=torch.Generator().manual_seed(0)).argsort(1))
    assert torch.equal(unrank(rank(mask), 16, 32), mask)
    w = n_of_m(4, 64, 16, 32)
    assert torch.equal(unpack(pack(w, "nm", n=16, m=32)), w)


def test_bits_are_little_endian():
    bits = torch.zeros(1, 12, dtype=torch.bool)
    bits[0, [0, 3, 9]] = True
    assert pack_bits(bits).tolist() == [[9, 2]]
    assert torch.equal(unpack_bits(pack_bits(bits), 12), bits)


@pytest.mark.parametrize(
    ("name", "w", "params", "reason"),
    [
        ("nm", torch.ones(4, 64), {"n": 2, "m": 33}, "<= 32"),
        ("nm", torch.ones(4, 8), {"n": 2, "m": 4}, "more than n=2"),
        ("nm", torch.zeros(4, 6), {"n": 2, "m": 4}, "does not divide"),
        ("block", torch.zeros(4, 6), {"r": 4, "c": 4}, "do not divide"),
        ("bitmask", torch.zeros(4), {}, "matrix"),
        ("sparse", torch.zeros(4, 4), {}, "Known: bitmask, block, csr, dense, nm"),
    ],
)
def test_refusals_say_why(name, w, params, reason):
    with pytest.raises(PumiceError, match=reason):
        pack(w, name, **params)


def test_wide_csr_uses_32_bit_columns():
    w = torch.zeros(2, 70000)
    w[1, 69999] = 2
    packed = pack(w, "csr")
    assert packed.tensors["columns"].dtype == torch.int32
    assert torch.equal(unpack(packed), w)
