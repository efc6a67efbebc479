"""Every layout of the registry stores and gives back any matrix it accepts, exactly, and knows its size beforehand."""

import itertools
import math

import pytest
import torch

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.weights.grid import Coding
from pumice.weights.layouts.base import (
    Packed,
    grid_of,
    pack,
    pack_bits,
    pack_smallest,
    repack,
    unpack,
    unpack_bits,
    validate,
)
from pumice.weights.layouts.nm import rank, unrank

LAYOUTS = [info.name for info in registry.family("layout").members()]
PARAMS = {info.name: info.obj.examples for info in registry.family("layout").members()}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def codings(name, params):
    """What a layout of integers can store with these parameters; None for the other layouts."""
    if not registry.layout.get(name).obj.coded:
        return [None]
    bits = int(name[3])
    if bits == 8:
        return [Coding("int8", 8)]
    cls = registry.layout.get(name).obj
    return [Coding(name, bits, params["group"], zero) for zero in ((False, True) if cls.zero_points else (False,))]


def on_grid(w, coding):
    """The matrix rounded to a grid of its own, and the grid; numbers that no grid holds become zero."""
    if coding is None:
        return w, None
    w = torch.nan_to_num(w, nan=0.0, posinf=0.0, neginf=0.0)
    if coding.group and w.shape[1] % coding.group:
        return w, coding.grid(torch.zeros(w.shape[0], coding.group))
    grid = coding.grid(w.float())
    return grid.snap(w.float()).to(w.dtype), grid


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
    cases = itertools.product(matrices(dtype), [(p, c) for p in PARAMS[name] for c in codings(name, p)])
    for (what, w), (params, coding) in cases:
        cls = registry.layout.get(name).obj
        w, grid = on_grid(w, coding)
        given = params if grid is None else {**params, "grid": grid}
        if cls.refuse(w, **given):
            continue
        accepted += 1
        packed = pack(w, name, grid=grid, **params)
        back = unpack(packed)
        assert (back.dtype, back.shape) == (dtype, w.shape), what
        assert torch.allclose(back, w, rtol=0, atol=0, equal_nan=True), what
        assert packed.nbytes == cls.stored_bytes(w, **given), what
        assert torch.equal(unpack(packed.narrow()), back) or not torch.isfinite(w).all(), what
        assert sum(t.is_floating_point() for t in packed.tensors.values()) == 1
        validate(packed)
    assert accepted >= 3


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "dense"])
def test_negative_zero_is_a_zero(name):
    w = torch.full((16, 32), -0.0)
    w[0, 0] = 1
    w, grid = on_grid(w, codings(name, PARAMS[name][0])[0])
    back = unpack(pack(w, name, grid=grid, **PARAMS[name][0]))
    assert not torch.signbit(back).any()


def stored(name, w):
    """A matrix in a layout, rounded where it stores integers."""
    params = PARAMS[name][0]
    w, grid = on_grid(w, codings(name, params)[-1])
    return pack(w, name, grid=grid, **params)


@pytest.mark.parametrize("name", LAYOUTS)
def test_description_rebuilds_the_empty_tensors(name):
    packed = stored(name, n_of_m(32, 64, 1, 4, torch.bfloat16))
    again = Packed.empty(packed.describe())
    assert again.specs() == packed.specs()
    assert again.params == packed.params
    assert again.shape == packed.shape
    assert again.device.type == "meta"
    # Integers times scales are rounded to the dtype, so that a wider one gives them more exactly.
    assert torch.equal(unpack(packed.astype(torch.float32)).bfloat16(), unpack(packed))


@pytest.mark.parametrize("name", LAYOUTS)
def test_tensors_go_through_safetensors(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    packed = stored(name, n_of_m(32, 64, 1, 4))
    before = unpack(packed).clone()
    safetensors.save_file(packed.tensors, tmp_path / "t.safetensors")
    packed.tensors = safetensors.load_file(tmp_path / "t.safetensors")
    validate(packed)
    assert torch.equal(unpack(packed), before)


@pytest.mark.parametrize("name", LAYOUTS)
def test_damage_is_noticed(name):
    packed = stored(name, n_of_m(32, 64, 1, 4))
    for key in packed.tensors:
        broken = Packed(packed.layout, packed.shape, packed.dtype, dict(packed.tensors), packed.params)
        broken.tensors[key] = packed.tensors[key][:-1]
        with pytest.raises(PumiceError, match="damaged"):
            validate(broken)
        del broken.tensors[key]
        if key == "zeros":
            continue  # a grid may do without
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
            if info.extras["storable"] and info.obj.refuse(w, **params) is None:
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
        ("sparse", torch.zeros(4, 4), {}, "Known: bitmask, block, csr, csr-tiles, dense, int3"),
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


CODED = [name for name in LAYOUTS if registry.layout.get(name).obj.coded]


@pytest.mark.parametrize("name", CODED)
def test_integers_go_from_layout_to_layout_without_rounding(name):
    packed = stored(name, n_of_m(16, 64, 2, 4))
    grid = grid_of(packed)
    for other in CODED:
        params = {"r": 4, "c": 8} if other.endswith("block") else {"n": 4, "m": 4} if other.endswith("nm") else {}
        params |= {"group": grid.group} if grid.group else {}
        if other[:4] != name[:4] or (grid.zeros is not None and not registry.layout.get(other).obj.zero_points):
            continue
        again = repack(packed, other, **params)
        assert torch.equal(unpack(again), unpack(packed))
        assert torch.equal(repack(again, packed.layout, **packed.params).numbers, packed.numbers)


@pytest.mark.parametrize("name", CODED)
def test_integers_need_a_grid_that_the_matrix_lies_on(name):
    params = PARAMS[name][0]
    with pytest.raises(PumiceError, match="needs the grid"):
        pack(torch.zeros(16, 32), name, **params)
    w, grid = on_grid(n_of_m(16, 32, 2, 4), codings(name, params)[0])
    w[w != 0] *= 1.01
    with pytest.raises(PumiceError, match="does not lie on its grid"):
        pack(w, name, grid=grid, **params)
    packed = stored(name, n_of_m(16, 32, 2, 4))
    packed.tensors["scales"][0] = math.nan
    with pytest.raises(PumiceError, match="NaN"):
        validate(packed)


def test_bits_of_groups_are_those_of_the_field():
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    w.view(64, 32, 16)[:, ::2] = 0
    for coding, name, bits in (
        (Coding("int4", 4, 16), "int4", 5.0),
        (Coding("int3", 3, 32), "int3", 3.5),
        (Coding("int4", 4, 16), "int4-bitmask", 2.5 + 1 / 16),
        (Coding("int4", 4, 16, True), "int4-bitmask", 2.625 + 1 / 16),
    ):
        m, grid = on_grid(w.bfloat16(), coding)
        assert pack(m, name, grid=grid, group=coding.group).bits == bits


def test_codes_lie_in_the_bytes_as_documented():
    levels = torch.arange(-8, 8).repeat(1, 1).float()
    grid = Coding("int4", 4, 16).grid(levels)
    assert grid.scales.tolist() == [[1.0]]
    packed = pack(levels, "int4", grid=grid, group=16)
    assert packed.tensors["codes"].tolist() == [[low | (low + 8) << 4 for low in range(8)]]
    three = torch.tensor([[-4, -3, 3, 0, 0, 0, 0, 0] * 2]).float()
    packed = pack(three, "int3", grid=Coding("int3", 3, 16).grid(three), group=16)
    bits = unpack_bits(packed.tensors["codes"], 24)[0].int().tolist()
    assert bits[:12] == [0, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1]


@pytest.mark.parametrize(("bits", "zero"), [(3, False), (3, True), (4, False), (4, True), (8, False)])
def test_a_grid_is_nearest_and_its_search_never_loses(bits, zero):
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(bits))
    plain, searched = (Coding("x", bits, 16, zero, search) for search in (0, 12))
    errors = []
    for coding in (plain, searched):
        grid = coding.grid(w)
        assert torch.equal(grid.scales, grid.scales.bfloat16().float())
        k = torch.arange(1 << bits).float()[None, None, None]
        z = float(1 << (bits - 1)) if grid.zeros is None else grid.zeros[:, :, None, None].float()
        points = grid.scales[:, :, None, None] * (k - z)
        best = (points - w.view(8, 4, 16, 1)).abs().amin(-1).flatten(1)
        torch.testing.assert_close((grid.snap(w) - w).abs(), best)
        errors.append((grid.snap(w) - w).view(8, 4, 16).square().sum(-1))
    assert (errors[1] <= errors[0] + 1e-7).all()
    assert errors[1].sum() < errors[0].sum() or bits == 8
    with pytest.raises(PumiceError, match="zero points"):
        Coding("x", 8, 16, True)


def test_zeros_anywhere_are_not_taken_for_n_of_m():
    """In few rows no group of 32 happens to be full, but filled up to the fullest one they would save nothing."""
    from pumice.weights.layouts.nm import NOfM

    torch.manual_seed(0)
    anywhere = torch.randn(16, 64) * (torch.rand(16, 64) < 0.5)
    assert NOfM.candidates(anywhere) == []
    two_of_four = torch.randn(16, 64) * torch.rand(16, 16, 4).argsort(-1).lt(2).flatten(1)
    assert {"n": 2, "m": 4} in NOfM.candidates(two_of_four)
    assert {"n": 1, "m": 4} in NOfM.candidates(torch.zeros(8, 32))
