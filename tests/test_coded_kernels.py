"""Kernels for integers with scales against the specification, on every instruction set of this machine.

The yardstick is the float64 product with the exact s·k: a kernel may be at most twice as far from it as plain PyTorch
with the weights rounded to the dtype.
"""

import pytest
import torch
import torch.nn.functional as F

from pumice.core import dispatch
from pumice.core.errors import PumiceError
from pumice.kernels import coded_ops, cpu_backend, ops
from pumice.weights.grid import Coding
from pumice.weights.layouts import base
from tests.guarded import check_guarded
from tests.test_kernels import needs_native

pytestmark = pytest.mark.usefixtures("poisoned")
CODINGS = [Coding("int8", 8)] + [Coding("int4", 4, group, zero) for group in (16, 32) for zero in (False, True)]
SHAPES = ((1, 16), (4, 37), (3, 48), (33, 160), (130, 128), (7, 1056))
LAYOUTS = ("int8", "int8-bitmask", "int8-nm", "int8-block", "int4", "int4-bitmask", "int3", "int3-bitmask")


def matrix(layout, o, i, dtype, coding, density=0.5, r=4, c=8) -> base.Packed:
    w = torch.randn(o, i)
    if "bitmask" in layout:
        width = coding.group or 1
        w *= (torch.rand(o, i // width) < density).repeat_interleave(width, 1)
    if layout == "int8-nm":
        w *= torch.rand(o, i // 4, 4).argsort(-1).lt(2).flatten(1)
    if layout == "int8-block":
        w *= (torch.rand(o // r, i // c) < density).repeat_interleave(r, 0).repeat_interleave(c, 1)
    grid = coding.grid(w)
    params = {"int8-nm": {"n": 2, "m": 4}, "int8-block": {"r": r, "c": c}}.get(layout, {})
    params |= {"group": coding.group} if coding.group else {}
    return base.pack(grid.snap(w).to(dtype), layout, grid=grid, **params)


def check(y, x, packed, bias) -> None:
    exact = base.unpack(packed.astype(torch.float64)).double()
    want = F.linear(x.double(), exact, None if bias is None else bias.double())
    plain = F.linear(x, base.unpack(packed), bias)
    assert (y.dtype, y.shape) == (x.dtype, want.shape)
    assert y.isfinite().all()
    error, allowed = (y.double() - want).square().mean().sqrt(), (plain.double() - want).square().mean().sqrt()
    luck = 2.0**-22 * F.linear(x.double().abs(), exact.abs()).square().mean().sqrt()
    assert error <= 2 * allowed + luck or not y.numel()


NATIVE = (*cpu_backend.CODED, "int8-nm")
DIVISOR = {"int8-nm": (1, 4), "int8-block": (4, 8)}


def layouts_of(coding, o=8, i=32):
    """Those that take the coding and the shape."""
    fits = {name for name in NATIVE if not o % DIVISOR.get(name, (1, 1))[0] and not i % DIVISOR.get(name, (1, 1))[1]}
    return [name for name in NATIVE if name in fits and name.startswith("int4") == bool(coding.group)]


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("coding", CODINGS, ids=lambda c: f"{c.name}-{c.group}-{c.zero}")
def test_kernels_of_every_instruction_set(isa, coding, dtype):
    for o, i in SHAPES:
        if coding.group and i % coding.group:
            continue
        for layout in layouts_of(coding, o, i):
            packed, bias = matrix(layout, o, i, dtype, coding), torch.randn(o).to(dtype)
            for name in ("decode", "panel"):
                run = dispatch.get("linear", layout, name).prepare(packed, bias)
                for rows in (0, 1, 2, 3, 4, 5, 9):
                    x = torch.randn(rows, i).to(dtype)
                    check(run(x), x, packed, bias)


@needs_native
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_matrices(isa, density):
    for coding in CODINGS:
        for layout in layouts_of(coding):
            packed = matrix(layout, 24, 96, torch.bfloat16, coding, density)
            run = dispatch.get("linear", layout, "decode").prepare(packed, torch.full((24,), 3.0))
            x = torch.randn(2, 96).bfloat16()
            check(run(x), x, packed, torch.full((24,), 3.0).bfloat16())
            if not density and "bitmask" in layout:
                assert (run(x) == 3).all()


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", NATIVE)
def test_threads_give_the_same_bits_and_panels_the_very_matrix(isa, layout, dtype):
    coding = Coding("int4", 4, 16) if "int4" in layout else Coding("int8", 8)
    packed = matrix(layout, 516, 1024, dtype, coding)
    run, x = dispatch.get("linear", layout, "decode").prepare(packed, None), torch.randn(3, 1024).to(dtype)
    alone = run(x)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(run(x), alone)
    out, plan = torch.empty(516, 1024, dtype=dtype), cpu_backend.Plan(packed, None)
    cpu_backend.native.expand(plan.handle, 0, 516, out.data_ptr(), 1)
    assert torch.equal(out, base.unpack(packed))


@needs_native
def test_not_a_number_is_not_hidden_nor_spread(isa):
    for coding in CODINGS:
        for layout in layouts_of(coding):
            packed = matrix(layout, 8, 160, torch.bfloat16, coding, density=0.4)
            x = torch.randn(1, 160).bfloat16()
            x[0, 5] = float("nan")
            y = dispatch.get("linear", layout, "decode").prepare(packed, None)(x)
            width = coding.group or 1
            kept = (base.unpack(packed) != 0).view(8, -1, width).any(-1)[:, 5 // width]
            if "bitmask" in layout and coding.group:
                assert torch.equal(y[0].isnan(), kept)
            else:
                assert y[0][kept].isnan().all()


MANY_ROWS = [(layout, name) for layout in ("int8", "int8-bitmask", "int8-block") for name in ("pairs", "bytes")]
needs_bytes = pytest.mark.skipif(
    cpu_backend.native is None or cpu_backend.instruction_sets()["avx512_bf16"] is not None,
    reason="int8 is multiplied in bytes by the kernels avx512_bf16 only",
)


@needs_bytes
@pytest.mark.parametrize(("layout", "name"), [("int8", "decode"), ("int8-bitmask", "decode"), *MANY_ROWS])
def test_bytes_lose_of_x_at_most_half_a_unit_and_nothing_in_sums(layout, name):
    # Wider than what 32 bits can sum; all weights at either end of their range; x of one sign, of one number, tiny, zero.
    for o, i in ((5, 20000), (3, 8256), (9, 515)):
        w = torch.randint(-128, 128, (o, i)).float()
        w[0], w[1], w[2] = -128, 127, w[2].sign() * 127
        w[-1] *= torch.rand(i) < 0.5
        scales = torch.full((o,), 2.0**-7)
        scales[1] = 2.0**-60
        tensors = {"values": w.to(torch.int8), "scales": scales.bfloat16()}
        if layout == "int8-block":
            blocks = {"columns": torch.zeros(o, dtype=torch.int32), "row_starts": torch.arange(o + 1).int()}
            tensors |= {"values": tensors["values"][:, None], **blocks}
        if "bitmask" in layout:
            tensors = {
                "values": w[w != 0].to(torch.int8),
                "bitmask": base.pack_bits(w != 0),
                "scales": tensors["scales"],
            }
        params = {"r": 1, "c": i} if layout == "int8-block" else {}
        packed = base.Packed(layout, (o, i), torch.bfloat16, tensors, params)
        run = dispatch.get("linear", layout, name).prepare(packed, None)
        x = torch.randn(7, i)
        x[1], x[2], x[3] = x[1].abs(), 0, 0
        x[2, 7] = 1000
        x[4] *= 1e-20
        x[5], x[6] = 2.0, -1e30
        x = x.bfloat16()
        want = F.linear(x.double(), w.double() * scales[:, None].double())
        unit = x.double().abs().amax(1, keepdim=True) / (127 if name == "bytes" else 32639)
        allowed = F.linear(unit.expand_as(x) / 2, (w * scales[:, None]).abs().double()) + want.abs() * 2.0**-8
        y = run(x)
        assert ((y.double() - want).abs() <= allowed).all()
        assert not y[3].any()


@needs_bytes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_in_bytes_that_is_not_finite_is_nan_and_the_others_are_not(bad):
    for layout in cpu_backend.INT8:
        packed = matrix(layout, 40, 160, torch.bfloat16, Coding("int8", 8))
        x = torch.randn(3, 160).bfloat16()
        x[1, 5] = bad
        for name in ("decode", "pairs", "bytes"):
            y = dispatch.get("linear", layout, name).prepare(packed, None)(x)
            assert y[1].isnan().all()
            assert y[[0, 2]].isfinite().all()


def check_rounded(y, x, packed, bias) -> None:
    """y is as far from the product as rounding each number of x to 127 steps may take it, and its own type."""
    w = base.unpack(packed.astype(torch.float64)).double()
    want = F.linear(x.double(), w, bias.double())
    half = x.double().abs().amax(1, keepdim=True) / 254
    allowed = F.linear(half.expand_as(x), w.abs()) + want.abs() * torch.finfo(x.dtype).eps + 1e-5
    assert (y.dtype, y.shape) == (x.dtype, want.shape)
    assert ((y.double() - want).abs() <= allowed).all()


def run_many(packed, rows=(0, 1, 2, 7, 8, 9, 16, 33, 130)) -> None:
    o, i = packed.shape
    bias = torch.randn(o).to(packed.dtype)
    bytes_ = dispatch.get("linear", packed.layout, "bytes").prepare(packed, bias)
    pairs = dispatch.get("linear", packed.layout, "pairs").prepare(packed, bias)
    for count in rows:
        x = torch.randn(count, i).to(packed.dtype)
        check_rounded(bytes_(x), x, packed, bias)
        if packed.dtype is torch.bfloat16:
            check(pairs(x), x, packed, bias)
    x = torch.randn(4, 2 * i).to(packed.dtype)[::2, ::2]
    check_rounded(bytes_(x), x, packed, bias)


@needs_bytes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_rows_in_bytes(dtype):
    for o, i in ((1, 1), (3, 7), *SHAPES, (68, 1032), (31, 515)):
        for layout in layouts_of(CODINGS[0], o, i):
            for density in (0.5, 0.0):
                run_many(matrix(layout, o, i, dtype, CODINGS[0], density))


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("r", "c"), [(16, 32), (4, 16), (32, 16), (2, 64), (3, 5), (1, 16), (32, 1), (8, 128), (6, 32), (9, 102), (64, 64)]
)
def test_blocks_of_integers_of_every_size(isa, r, c, dtype):
    for density in (0.5, 0.0, 1.0):
        packed = matrix("int8-block", 3 * r, 5 * c, dtype, CODINGS[0], density, r, c)
        bias = torch.randn(3 * r).to(dtype)
        for name in ("decode", "panel"):
            run = dispatch.get("linear", "int8-block", name).prepare(packed, bias)
            for rows in (0, 1, 2, 3, 4, 5):
                x = torch.randn(rows, 5 * c).to(dtype)
                check(run(x), x, packed, bias)
        if isa == "avx512_bf16":
            run_many(packed)


@needs_bytes
def test_more_rows_in_bytes_than_the_cache_has_room_for():
    for layout in cpu_backend.INT8:
        packed = matrix(layout, 40, 8192, torch.bfloat16, CODINGS[0])
        run_many(packed, (48, 65, 300))
        names = ("pairs", "bytes")
        runs = [dispatch.get("linear", layout, name).prepare(packed, None) for name in names]
        x = torch.randn(300, 8192).bfloat16()
        alone = [run(x) for run in runs]
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(run(x), y) for run, y in zip(runs, alone, strict=True))
        torch.set_num_threads(1)


@needs_native
def test_x_is_rounded_only_where_that_is_asked_for_and_bytes_are_multiplied():
    def reasons(layout, dtype=torch.bfloat16, width=64, activations=None):
        params = {"r": 4, "c": 8} if layout == "int8-block" else {}
        call = dispatch.Call("linear", layout, dtype, "cpu", 64, (32, width), params, activations)
        return {backend.name: reason for backend, reason in dispatch.candidates(call)}

    for layout in cpu_backend.INT8:
        assert "only where that is asked for" in str(reasons(layout)["bytes"])
        assert "65536 columns, not 65544" in str(reasons(layout, width=65544, activations="int8")["bytes"])
        assert "float32 not supported" in str(reasons(layout, torch.float32)["pairs"])
        cpu_backend.force("portable")
        found = reasons(layout, activations="int8")
        cpu_backend.force(None)
        assert "AVX-512 VNNI" in str(found["bytes"])
        assert "AVX-512 VNNI" in str(found["pairs"])
        assert found["panel"] is None


@needs_bytes
def test_sums_follow_positions_that_change_in_place():
    # The same integers in other rows: what was derived from them before must not be found again.
    packed = matrix("int8-bitmask", 2, 64, torch.bfloat16, CODINGS[0])
    x = torch.randn(9, 64).bfloat16()
    for name in ("pairs", "bytes"):
        dispatch.get("linear", "int8-bitmask", name).prepare(packed, None)(x)
        packed.tensors["bitmask"].copy_(packed.tensors["bitmask"].flip(0))
        again = dispatch.get("linear", "int8-bitmask", name).prepare(packed, None)(x)
        (check if name == "pairs" else check_rounded)(again, x, packed, torch.zeros(2).bfloat16())


@needs_bytes
def test_what_is_kept_beside_integers_counts_once():
    packed = matrix("int8-nm", 32, 64, torch.bfloat16, CODINGS[0])
    kept = {dispatch.get("linear", "int8-nm", name).extra for name in ("decode", "pairs", "bytes", "panel")}
    assert [extra(packed) for extra in kept] == [32 * (64 // 8 + 8 + 4)]


@needs_bytes
def test_products_of_bytes_are_for_integers_with_sums():
    x, y = torch.randn(2, 64).bfloat16(), torch.empty(2, 8).bfloat16()
    given = (x.data_ptr(), 2, y.data_ptr(), 1, 1)
    plan = cpu_backend.Plan(matrix("int8", 8, 64, torch.bfloat16, CODINGS[0]), None)
    with pytest.raises(ValueError, match="only for int8 with sums"):
        cpu_backend.native.run_bytes(plan.handle, *given)
    plan = cpu_backend.Plan(matrix("int8", 8, 64, torch.bfloat16, CODINGS[0]), None, sums=True)
    with pytest.raises(ValueError, match="1 or 2 bytes"):
        cpu_backend.native.run_bytes(plan.handle, x.data_ptr(), 2, y.data_ptr(), 3, 1)
    cpu_backend.native.run_bytes(plan.handle, *given)


@needs_bytes
def test_a_module_rounds_what_goes_into_it_only_if_told():
    from pumice.weights.modules import SparseLinear

    layer = SparseLinear(matrix("int8-block", 64, 128, torch.bfloat16, CODINGS[0]))
    x = torch.randn(33, 128).bfloat16()
    exact = layer(x)
    layer.set_backends(None, activations="int8")
    rounded = layer(x)
    assert not torch.equal(rounded, exact)
    check_rounded(rounded, x, layer.packed, torch.zeros(64))
    layer.set_backends([(4, "decode"), (None, "bytes")], activations="int8")
    assert torch.equal(layer(x), rounded)
    layer.set_backends([(None, "bytes")])
    with pytest.raises(PumiceError, match="only where that is asked for"):
        layer(x)
    with pytest.raises(PumiceError, match="activations='int4' must be 'int8' or None"):
        layer.set_backends(None, activations="int4")
    layer.set_backends(None)
    assert torch.equal(layer(x), exact)


@needs_native
@pytest.mark.parametrize("layout", NATIVE)
def test_damage_is_refused_by_the_plan(layout):
    coding = Coding("int4", 4, 16) if "int4" in layout else Coding("int8", 8)
    packed = matrix(layout, 8, 64, torch.float32, coding)
    for name in ("scales", "codes" if coding.group else "values"):
        broken = base.Packed(layout, packed.shape, packed.dtype, dict(packed.tensors), packed.params)
        broken.tensors[name] = packed.tensors[name][:-1]
        with pytest.raises(PumiceError, match="damaged"):
            cpu_backend.Plan(broken, None)


def test_groups_that_no_kernel_takes_run_otherwise():
    packed = matrix("int4", 8, 128, torch.bfloat16, Coding("int4", 4, 64))
    call = dispatch.Call("linear", "int4", torch.bfloat16, "cpu", 1, (8, 128), packed.params)
    reasons = {backend.name: reason for backend, reason in dispatch.candidates(call)}
    assert "groups of 64" in str(reasons["decode"])
    x = torch.randn(1, 128).bfloat16()
    for backend, reason in dispatch.candidates(call):
        if reason is None:
            check(backend.prepare(packed, None)(x), x, packed, None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_runs_without_a_kernel_of_its_own(layout):
    coding = Coding("x", int(layout[3]), 16 if layout[3] != "8" else 0)
    packed = matrix(layout, 24, 64, torch.float16, coding)
    x = torch.randn(5, 64).half()
    check(dispatch.get("linear", layout, "unpack").prepare(packed, None)(x), x, packed, None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operator_keeps_torch_s_rules_and_has_gradients(layout):
    torch.use_deterministic_algorithms(False)
    coding = Coding("x", int(layout[3]), 16 if layout[3] != "8" else 0)
    packed = matrix(layout, 24, 64, torch.float32, coding)
    scales = packed.tensors["scales"].requires_grad_()
    x, bias = torch.randn(3, 64, requires_grad=True), torch.randn(24, requires_grad=True)
    structure = [packed.tensors[name] for name in sorted(packed.tensors) if name != "scales"]
    params = [packed.params[name] for name in sorted(packed.params)]
    given = (x, scales, structure, coded_ops.form_of(packed), [24, 64], params, bias)
    torch.library.opcheck(coded_ops.linear_coded, given)
    y = ops.traced_linear(packed, bias, x)
    found = torch.autograd.grad(y.square().sum(), (x, scales, bias))
    want = torch.autograd.grad(F.linear(x, base.unpack(packed), bias).square().sum(), (x, scales, bias))
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_packed_layer_compiles_into_one_graph():
    torch.use_deterministic_algorithms(False)
    from pumice.weights.modules import SparseLinear

    layer = SparseLinear(matrix("int4-bitmask", 32, 64, torch.float32, Coding("int4", 4, 16)))
    x = torch.randn(3, 64)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), F.linear(x, layer.dense_weight()), rtol=1e-4, atol=1e-4)


@needs_native
def test_no_byte_beyond_the_tensors_is_read():
    # Rows at the end of a page: the guarded buffers of test_kernels, with integers in them.
    check_guarded("""
        from tests.test_coded_kernels import CODINGS, layouts_of, matrix
        for _ in forced():
            for dtype in (torch.bfloat16, torch.float32):
                for coding in CODINGS:
                    for layout in layouts_of(coding):
                        for o, i in ((5, 64), (3, 224), (4, 32), (1, 96), (8, 160)):
                            if layout not in layouts_of(coding, o, i):
                                continue
                            packed = matrix(layout, o, i, dtype, coding)
                            packed.tensors = {k: at_the_end(t) if t.numel() else t for k, t in packed.tensors.items()}
                            names = ("decode", "panel")
                            if cpu_backend.native.has_bytes() and layout in cpu_backend.INT8:
                                names += ("pairs", "bytes")
                            for name in names:
                                run = dispatch.get("linear", layout, name).prepare(packed, None)
                                for rows in (1, 3, 17):
                                    run(at_the_end(torch.randn(rows, i).to(dtype)))
    """)
