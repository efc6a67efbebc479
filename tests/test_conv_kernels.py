"""The kernels of sparse convolutions, of every instruction set.

The yardstick is PyTorch's convolution of the unpacked weight in float64; what bf16 adds is one rounding of the result.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from pumice.core import dispatch
from pumice.core.convolution import Convolution, bundled_share
from pumice.core.errors import PumiceError
from pumice.kernels import conv_bundles, conv_cpu, cpu_backend, reference
from pumice.weights.layouts import base
from pumice.weights.modules import SparseConv2d
from tests.guarded import check_guarded
from tests.test_kernels import mask_of, needs_native

pytestmark = pytest.mark.usefixtures("poisoned")
LAYOUTS = {"csr": {}, "bitmask": {}, "nm": {"n": 2, "m": 4}, "block": {"r": 4, "c": 8}}
DTYPES = (torch.float32, torch.bfloat16)
PLAIN, RELU, RELU6 = (-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0)
CASES = (
    # outputs, channels, kernel, size, stride, padding, dilation
    (1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1)),
    (65, 5, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1)),
    (70, 33, (1, 1), (7, 9), (1, 1), (0, 0), (1, 1)),
    (6, 130, (1, 1), (8, 16), (1, 1), (0, 0), (1, 1)),
    (3, 300, (1, 1), (9, 33), (1, 1), "valid", (1, 1)),
    (64, 16, (1, 1), (9, 7), (2, 2), (0, 0), (1, 1)),
    (3, 2, (1, 1), (70, 9), (3, 1), (2, 0), (1, 1)),
    (3, 2, (1, 1), (5, 5), (1, 1), (2, 1), (1, 1)),
    (66, 1, (3, 3), (7, 7), (1, 1), (1, 1), (1, 1)),
    (130, 20, (3, 3), (9, 33), (1, 1), (1, 1), (1, 1)),
    (3, 2, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
    (3, 2, (3, 3), (2, 3), (1, 1), (4, 5), (1, 1)),
    (10, 3, (3, 3), (33, 9), (3, 2), (1, 0), (2, 1)),
    (3, 2, (3, 3), (13, 12), (4, 3), (1, 2), (3, 4)),
    (6, 3, (3, 1), (9, 7), (1, 2), (1, 0), (1, 1)),
    (5, 3, (7, 7), (33, 70), (2, 2), (3, 3), (1, 1)),
    (9, 4, (5, 5), (9, 9), (2, 3), (2, 2), (1, 2)),
    (4, 3, (5, 5), (5, 7), (1, 1), (0, 0), (1, 1)),
    (4, 6, (2, 2), (9, 33), (2, 2), (0, 0), (1, 1)),
    (2, 3, (2, 2), (11, 12), (5, 4), (0, 0), (1, 1)),
    (7, 3, (2, 2), (7, 9), (1, 1), "same", (1, 1)),
    (4, 3, (2, 4), (9, 7), (1, 1), "same", (2, 3)),
    (4, 2, (3, 5), (70, 9), (1, 1), "same", (1, 2)),
)
VARIANTS = (
    # images, bias, clamp, add, memory format of x
    (1, True, PLAIN, False, torch.contiguous_format),
    (3, False, RELU, True, torch.channels_last),
    (2, True, RELU6, True, torch.contiguous_format),
)


def weight(outputs, inputs, dtype=torch.float32, density=0.3):
    w_OI = torch.randn(outputs, inputs) * (torch.rand(outputs, inputs) < density)
    if outputs > 2:
        w_OI[1::3] = 0
    return w_OI.to(dtype)


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture(params=["taps", "bundles"])
def way(request):
    """Each kernel of sparse convolutions."""
    return request.param


def bound(way, packed, bias=None):
    return dispatch.get("conv2d", packed.layout, way).prepare(packed, bias)


def exact(x, packed, bias, how, add=None):
    """The convolution in float64; padding by hand, since it may differ before and after."""
    x = F.pad(x.double(), (how.before[1], how.after[1], how.before[0], how.after[0]))
    settings = {"kernel_size": how.kernel_size, "stride": how.stride, "dilation": how.dilation}
    y = reference.conv2d(x, packed, bias, **settings)
    return (y if add is None else y + add.double()).clamp(*how.clamp)


def close(y, expected, dtype=torch.float32, **allowed):
    assert y.dtype is dtype
    torch.testing.assert_close(
        y.double(), expected.double(), rtol=1e-5 if dtype is torch.float32 else 2**-8, atol=1e-4, **allowed
    )


def sweep(run, packed, bias, channels, size, how, variants=VARIANTS):
    for images, biased, clamp, added, order in variants:
        held = bias if biased else None
        full = Convolution(how.kernel_size, how.stride, how.before, how.after, how.dilation, clamp=clamp)
        x = (3 * torch.randn(images, channels, *size)).to(packed.dtype).to(memory_format=order)
        shape = (images, packed.shape[0], *full.output(*size))
        add = torch.randn(shape).to(packed.dtype).to(memory_format=order) if added else None
        y = run[biased](x, full) if add is None else run[biased](x, full, add)
        assert y.shape == shape
        assert y.is_contiguous()
        close(y, exact(x, packed, held, full, add), packed.dtype)


def check(way, packed, channels, size, how, variants=VARIANTS):
    bias = torch.randn(packed.shape[0]).to(packed.dtype)
    runs = {True: bound(way, packed, bias), False: bound(way, packed)}
    sweep(runs, packed, bias, channels, size, how, variants)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_convolves_any_shape(isa, dtype, way):
    for outputs, channels, kernel, size, *settings in CASES:
        how = Convolution.of(kernel, *settings)
        check(way, base.pack(weight(outputs, channels * math.prod(kernel), dtype), "csr"), channels, size, how)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_are_as_many_as_pytorch_says(case):
    outputs, channels, kernel, size, stride, padding, dilation = case
    how = Convolution.of(kernel, stride, padding, dilation)
    w = torch.zeros(outputs, channels, *kernel)
    y = F.conv2d(torch.zeros(1, channels, *size), w, None, stride, padding, dilation)
    assert how.output(*size) == y.shape[2:]


@needs_native
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_weights_from_empty_to_full(isa, density, way):
    for dtype in DTYPES:
        for channels, kernel, padding in ((300, (1, 1), (0, 0)), (20, (3, 3), (1, 1))):
            w_OI = (torch.randn(70, channels * math.prod(kernel))).to(dtype)
            w_OI *= torch.rand(w_OI.shape) < density
            check(way, base.pack(w_OI, "csr"), channels, (9, 8), Convolution(kernel, before=padding, after=padding))


@needs_native
def test_outputs_of_very_different_lengths(isa, way):
    for dtype in DTYPES:
        w_OI = torch.randn(150, 270) * (torch.rand(150, 270) < torch.rand(150, 1).square())
        w_OI[:, 128:256] = 0
        w_OI[64:128] = 0
        check(way, base.pack(w_OI.to(dtype), "csr"), 30, (7, 9), Convolution((3, 3), before=(1, 1), after=(1, 1)))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_convolved(layout, dtype, way):
    params = LAYOUTS[layout]
    for channels, kernel, padding in ((8, (3, 3), (1, 1)), (40, (1, 1), (0, 0)), (4, (2, 2), "same")):
        inputs = channels * math.prod(kernel)
        w_OI = torch.where(mask_of(layout, 68, inputs, params, 0.4), torch.randn(68, inputs), 0.0).to(dtype)
        w_OI[:4] = 0
        packed = base.pack(w_OI, layout, **params)
        check(way, packed, channels, (9, 7), Convolution.of(kernel, (1, 1), padding, (1, 1)))
        bundles = conv_bundles.bundles_of(packed)
        held = nbytes(conv_cpu.taps_of(packed)) if way == "taps" else nbytes(bundles) + nbytes([bundles.columns_S2])
        assert dispatch.get("conv2d", layout, way).extra(packed) == held > 0


@needs_native
@pytest.mark.parametrize("clamp", [PLAIN, RELU, RELU6], ids=["plain", "relu", "relu6"])
def test_nan_stays_nan_where_it_is_read_and_nowhere_else(isa, clamp, way):
    for dtype in DTYPES:
        for size, kernel, stride, padding in (((8, 16), 1, 1, 0), ((7, 9), 3, 1, 1), ((9, 33), 3, 2, 0)):
            packed = base.pack(weight(70, 6 * kernel * kernel, dtype), "csr")
            how = Convolution.of((kernel, kernel), (stride, stride), (padding, padding), (1, 1), clamp=clamp)
            x = torch.randn(2, 6, *size).to(dtype)
            x[0, 2, 3, 4] = x[1, 5, 6, 7] = math.nan
            add = torch.randn(2, 70, *how.output(*size)).to(dtype)
            added = add.clone()
            added[1, 3, 0, 0] = math.nan
            read = base.unpack(packed).ne(0)
            if way == "bundles":
                # What one of eight outputs reads, all of them read.
                read = torch.cat([eight.any(0).expand_as(eight) for eight in read.split(8)])
            read = read.double().unflatten(1, (6, kernel, kernel))
            touched = F.conv2d(x.isnan().double(), read, None, stride, padding) > 0
            assert touched.any()
            finite = exact(x.nan_to_num(), packed, None, how)
            close(bound(way, packed)(x, how), finite.masked_fill(touched, math.nan), dtype, equal_nan=True)
            finite = exact(x.nan_to_num(), packed, None, how, add).masked_fill(touched | added.isnan(), math.nan)
            close(bound(way, packed)(x, how, added), finite, dtype, equal_nan=True)


@needs_native
def test_infinite_numbers_are_clamped(isa, way):
    for dtype in DTYPES:
        for size in ((8, 8), (3, 3)):
            x = torch.tensor([math.inf, -math.inf]).to(dtype).view(2, 1, 1, 1).expand(2, 1, *size)
            run = bound(way, base.pack(torch.ones(1, 1, dtype=dtype), "csr"))
            for clamp, most in ((PLAIN, math.inf), (RELU, math.inf), (RELU6, 6.0)):
                y = run(x, Convolution((1, 1), clamp=clamp))
                assert (y[0] == most).all()
                assert (y[1] == clamp[0]).all()


@needs_native
def test_threads_change_no_bit(isa, way):
    for dtype in DTYPES:
        for outputs, images, size in ((130, 1, (33, 33)), (70, 3, (9, 40)), (65, 1, (3, 3)), (1, 5, (20, 70))):
            packed = base.pack(weight(outputs, 40 * 9, dtype), "csr")
            run, how = (
                bound(way, packed, torch.randn(outputs)),
                Convolution((3, 3), before=(1, 1), after=(1, 1), clamp=RELU),
            )
            x = torch.randn(images, 40, *size).to(dtype)
            found = []
            for threads in (1, 2, 7):
                torch.set_num_threads(threads)
                found.append(run(x, how))
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])


@needs_native
def test_two_callers_at_once(way):
    packed, how = base.pack(weight(70, 180), "csr"), Convolution((3, 3), before=(1, 1), after=(1, 1))
    run, inputs = bound(way, packed), [torch.randn(1, 20, 9 + k, 33) for k in range(8)]
    expected = [run(x, how) for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for y, wanted in zip(pool.map(lambda x: run(x, how), inputs), expected, strict=True):
                assert torch.equal(y, wanted)


@needs_native
def test_no_images_give_no_images(way):
    run = bound(way, base.pack(weight(5, 3), "csr"))
    assert run(torch.empty(0, 3, 4, 4), Convolution((1, 1))).shape == (0, 5, 4, 4)


@needs_native
def test_inputs_that_do_not_fit_are_refused(way):
    run, how = bound(way, base.pack(weight(6, 27), "csr")), Convolution((3, 3))
    for x, message in (
        (torch.randn(3, 9, 9), r"\(3, 9, 9\)"),
        (torch.randn(1, 3, 9, 9, dtype=torch.float64), "float64"),
        (torch.randn(1, 3, 9, 9, dtype=torch.bfloat16), "bfloat16"),
        (torch.randn(1, 4, 9, 9), "does not fit"),
        (torch.randn(1, 3, 2, 9), "does not fit"),
        (torch.randn(1, 3, 9, 2), "does not fit"),
    ):
        with pytest.raises(PumiceError, match=message):
            run(x, how)
    x = torch.randn(1, 3, 9, 9)
    with pytest.raises(PumiceError, match="does not fit"):
        run(x, Convolution((3, 2)))
    sparse = SparseConv2d(base.pack(weight(6, 27), "csr"), None, kernel_size=(3, 3))
    with pytest.raises(PumiceError, match="does not fit"):
        sparse(torch.randn(1, 4, 9, 9))
    for add in (torch.randn(1, 6, 7, 8), torch.randn(6, 7, 7), torch.randn(1, 6, 7, 7, dtype=torch.bfloat16)):
        with pytest.raises(PumiceError, match="add is"):
            run(x, how, add)


def refusal(dtype=torch.float32, device="cpu", **params):
    call = dispatch.Call("conv2d", "csr", dtype, device, 1, (8, 8), params)
    reasons = {backend.name: reason for backend, reason in dispatch.candidates(call)}
    assert reasons["taps"] == reasons["bundles"]
    return reasons["taps"]


def test_reasons_to_refuse():
    assert "4 groups" in refusal(groups=4)
    assert "zeros" in refusal(zeros=0)
    assert "1024 positions" in refusal(kernel_h=64, kernel_w=64)
    assert "float16" in refusal(torch.float16)
    assert "cuda" in refusal(device="cuda:0")
    assert refusal() == cpu_backend.missing()
    with pytest.raises(PumiceError, match="4 groups"):
        dispatch.choose(dispatch.Call("conv2d", "csr", torch.float32, "cpu", 1, (8, 8), {"groups": 4}))


@needs_native
@pytest.mark.parametrize("column", [27, 127, 128, 5000])
def test_damaged_columns_are_refused(column, way):
    packed = base.pack(weight(70, 27), "csr")
    columns = packed.tensors["columns"].clone()
    columns[-1] = column
    damaged = base.Packed("csr", packed.shape, packed.dtype, {**packed.tensors, "columns": columns})
    with pytest.raises(PumiceError, match=r"damaged|outside"):
        bound(way, damaged)


@needs_native
def test_damaged_row_starts_are_refused(way):
    packed = base.pack(weight(70, 27), "csr")
    for place, change in ((-1, -1), (-1, 5), (0, 1), (5, 100)):
        starts = packed.tensors["row_starts"].clone()
        starts[place] += change
        damaged = base.Packed("csr", packed.shape, packed.dtype, {**packed.tensors, "row_starts": starts})
        with pytest.raises(PumiceError, match=r"damaged|row"):
            bound(way, damaged)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_outputs_are_multiplied_alone(isa, dtype):
    for outputs, group in ((32, 16), (40, 8), (36, 4)):
        kept = (torch.rand(-(-outputs // group), 90) < 0.3).repeat_interleave(group, 0)[:outputs]
        packed = base.pack((torch.randn(outputs, 90) * kept).to(dtype), "csr")
        check("bundles", packed, 10, (7, 9), Convolution((3, 3), before=(1, 1), after=(1, 1)))
        if group >= 8:
            assert bundled_share(base.unpack(packed)) == pytest.approx(float(kept.float().mean()))
    assert bundled_share(torch.eye(16, 4)) == pytest.approx(4 / 8)
    # A dense weight has all its columns, zeros or not.
    assert (
        conv_bundles.bundles_of(base.pack(torch.zeros(9, 5, dtype=dtype), "dense")).starts == torch.tensor([0, 3, 6])
    ).all()


@needs_native
@pytest.mark.parametrize("codes", [[4, -1], [1024, 0], [0, 1024 * 3], [-1, 0], [0, -2]])
def test_bundles_that_point_outside_are_refused(codes):
    # 2 channels of 3 taps, in one step.
    values, starts = torch.zeros(1, 8, 2), torch.tensor([0, 1], dtype=torch.int32)
    codes = torch.tensor(codes, dtype=torch.int32)
    args = values.data_ptr(), 1, codes.data_ptr(), starts.data_ptr(), 0, 8, 6, 3, 1
    if codes.tolist() == [1024, 0]:
        assert cpu_backend.native.plan_bundles(*args) is not None
        args = (*args[:5], 8, 6, 2000, 1)
    with pytest.raises(ValueError, match="do not match"):
        cpu_backend.native.plan_bundles(*args)


@pytest.mark.parametrize("name", ["torch", "onednn", "bundles"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_ways_compute_the_same(name, dtype):
    backend = dispatch.get("conv2d", "dense", name)
    call = dispatch.Call("conv2d", "dense", dtype, "cpu", 1, (10, 18))
    if reason := backend.refuse(call):
        pytest.skip(reason)
    packed = base.pack(weight(10, 18, dtype), "dense")
    bias = torch.randn(10).to(dtype)
    run = backend.prepare(packed, bias)
    for settings in (((1, 1), (1, 1), (1, 1)), ((2, 1), (0, 2), (1, 2)), ((1, 1), "same", (1, 1))):
        for clamp in (PLAIN, RELU, RELU6, (-1.0, 2.0)):
            how = Convolution.of((3, 3), *settings, clamp=clamp)
            for images, size in ((1, (9, 7)), (3, (12, 33))):
                x = torch.randn(images, 2, *size).to(dtype)
                for added in (False, True):
                    add = torch.randn(images, 10, *how.output(*size)).to(dtype) if added else None
                    expected = exact(x, packed, bias, how, add)
                    y = run(x, how) if add is None else run(x, how, add)
                    assert y.dtype is dtype
                    torch.testing.assert_close(
                        y.double(), expected, rtol=2**-6, atol=1e-4 if dtype is torch.float32 else 0.06
                    )


@pytest.mark.parametrize("name", ["torch", "onednn"])
def test_dense_ways_take_groups_and_padding_on_one_side(name):
    backend = dispatch.get("conv2d", "dense", name)
    if reason := backend.refuse(dispatch.Call("conv2d", "dense", torch.float32, "cpu", 1, (8, 8))):
        pytest.skip(reason)
    w_OI, x = torch.randn(8, 2 * 4), torch.randn(2, 4, 6, 5)
    how = Convolution.of((2, 2), (1, 1), "same", (1, 1), 2)
    y = backend.prepare(base.pack(w_OI, "dense"), None)(x, how)
    expected = F.conv2d(x, w_OI.unflatten(1, (2, 2, 2)), None, padding="same", groups=2)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@needs_native
def test_no_number_beyond_the_images_and_the_plan_is_read():
    check_guarded("""
        from pumice.core.convolution import Convolution, bundled_share
        from pumice.kernels import conv_bundles, conv_cpu
        conv_cpu.taps_of = lambda packed: conv_cpu.Taps(*map(at_the_end, conv_cpu._taps(packed)))
        conv_bundles.bundles_of = lambda packed: conv_bundles.Bundles(*map(at_the_end, conv_bundles._bundles(packed)))
        for _ in forced():
            for dtype in (torch.bfloat16, torch.float32):
                for o, channels, kernel, size, stride, padding in (
                    (5, 3, 1, (5, 7), 1, 0), (16, 40, 1, (8, 8), 1, 0), (9, 4, 3, (7, 7), 1, 1), (8, 3, 3, (9, 33), 1, 1),
                    (8, 3, 3, (9, 33), 2, 1), (3, 2, 1, (9, 35), 2, 0), (2, 1, 3, (70, 40), 1, 0), (3, 2, 5, (11, 13), 3, 2),
                ):
                    w_OI = torch.randn(o, channels * kernel**2) * (torch.rand(o, channels * kernel**2) < 0.4)
                    packed = base.pack(w_OI.to(dtype), "csr")
                    how = Convolution.of((kernel, kernel), (stride, stride), (padding, padding), (1, 1))
                    for way in ("taps", "bundles"):
                        run = dispatch.get("conv2d", "csr", way).prepare(packed, None)
                        for images in (1, 2):
                            x = at_the_end(torch.randn(images, channels, *size).to(dtype))
                            add = at_the_end(torch.randn(images, o, *how.output(*size)).to(dtype))
                            run(x, how)
                            run(x, how, add)
    """)
