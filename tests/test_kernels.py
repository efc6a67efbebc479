"""Every kernel against the specification: odd shapes, every instruction set of this machine, poisoned outputs.

The yardstick is the float64 product: a kernel may be at most twice as far from it as plain PyTorch in the same dtype.
"""

import json
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

from pumice.core import dispatch
from pumice.core.errors import PumiceError
from pumice.kernels import cpu_backend, features, ops, planned, reference
from pumice.weights.layouts import base
from tests.conftest import ISAS, ROOT
from tests.guarded import check_guarded

LAYOUTS = {"bitmask": {}, "nm": {"n": 2, "m": 4}, "block": {"r": 4, "c": 8}, "csr": {}}
WITH_DENSE = {"dense": {}, **LAYOUTS}
ROWS = (*range(18), 33, 130)
ANYHOW = ("dense", "bitmask", "csr")
"""Layouts that take any zeros."""
NATIVE = {
    "dense": {"decode"},
    "bitmask": {"decode", "panel"},
    "nm": {"decode", "panel"},
    "block": {"decode", "blocks", "panel"},
    "csr": {"tiles"},
}
SHAPES = {
    "anyhow": ((1, 1), (3, 7), (33, 65), (5, 1000), (130, 128), (40, 64), (300, 513), (17, 256)),
    "nm": (
        (3, 4, 1, 4),
        (33, 68, 2, 4),
        (7, 30, 3, 10),
        (16, 72, 4, 8),
        (130, 128, 2, 4),
        (4, 96, 16, 32),
        (5, 21, 2, 3),
    ),
    "block": (
        (1, 1, 1, 1),
        (6, 10, 3, 5),
        (16, 64, 16, 32),
        (48, 96, 16, 32),
        (8, 200, 8, 40),
        (20, 66, 5, 33),
        (14, 24, 7, 8),
        (64, 512, 4, 1),
        (40, 64, 20, 2),
        (30, 1030, 15, 103),
        (70, 1024, 1, 16),
    ),
}
needs_native = pytest.mark.skipif(cpu_backend.native is None, reason=str(cpu_backend.missing()))


pytestmark = pytest.mark.usefixtures("poisoned")


def mask_of(layout: str, o: int, i: int, params: dict[str, int], density: float = 0.5) -> torch.Tensor:
    if layout == "nm":
        return torch.rand(o, i // params["m"], params["m"]).argsort(-1).lt(params["n"]).flatten(1)
    if layout == "block":
        kept = torch.rand(o // params["r"], i // params["c"]) < density
        return kept.repeat_interleave(params["r"], 0).repeat_interleave(params["c"], 1)
    return torch.rand(o, i) < density


def matrix(layout, o, i, dtype, params=None, density=0.5) -> base.Packed:
    params = WITH_DENSE[layout] if params is None else params
    w_OI = torch.where(mask_of(layout, o, i, params, density), torch.randn(o, i), 0.0).to(dtype)
    return base.pack(w_OI, layout, **params)


def check(y: torch.Tensor, x: torch.Tensor, packed: base.Packed, bias: torch.Tensor | None) -> None:
    """y is x's dtype, finite, and at most twice as far from the float64 product as F.linear."""
    w = base.unpack(packed)
    exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    plain = F.linear(x, w, bias)
    assert y.dtype is x.dtype
    assert y.shape == exact.shape
    assert y.isfinite().all()
    error, allowed = (y.double() - exact).square().mean().sqrt(), (plain.double() - exact).square().mean().sqrt()
    # A single number may hit the exact value by luck: half a bit of the summed magnitudes is nobody's fault.
    luck = 2.0**-24 * F.linear(x.double().abs(), w.double().abs()).square().mean().sqrt()
    assert error <= 2 * allowed + luck or not y.numel()


def few(layout: str) -> str:
    """The C++ backend for few rows."""
    return "tiles" if layout == "csr" else "decode"


def backends_for(packed: base.Packed, rows: int) -> list[dispatch.Backend]:
    call = dispatch.Call("linear", packed.layout, packed.dtype, "cpu", rows, packed.shape, packed.params)
    return [backend for backend, reason in dispatch.candidates(call) if reason is None]


def sweep(packed: base.Packed, bias: torch.Tensor | None) -> set[str]:
    """Every backend on every number of rows; the names of those that ran."""
    ran = {}
    for rows in ROWS:
        x = torch.randn(rows, packed.shape[1]).to(packed.dtype)
        for backend in backends_for(packed, rows):
            run = ran.setdefault(backend.name, backend.prepare(packed, bias))
            check(run(x), x, packed, bias)
    return set(ran)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ANYHOW)
def test_kernels_for_any_zeros_of_every_instruction_set(isa, layout, dtype):
    for o, i in SHAPES["anyhow"]:
        for density in (0.5, 0.07):
            packed = matrix(layout, o, i, dtype, density=density)
            assert NATIVE[layout] <= sweep(packed, torch.randn(o).to(dtype))


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("layout", "names"), [("nm", ("n", "m")), ("block", ("r", "c"))])
def test_kernels_for_patterns_of_every_instruction_set(isa, layout, names, dtype):
    for o, i, *sizes in SHAPES[layout]:
        packed = matrix(layout, o, i, dtype, dict(zip(names, sizes, strict=True)))
        assert NATIVE[layout] <= sweep(packed, torch.randn(o).to(dtype))


@needs_native
def test_rows_of_very_different_lengths_in_tiles(isa):
    for dtype in (torch.bfloat16, torch.float32):
        w_OI = torch.randn(1100, 600)
        # From empty to full, in no order; an empty tile and an empty chunk of rows among them.
        w_OI *= torch.rand(1100, 600) < torch.rand(1100, 1).square()
        w_OI[:, 256:512] = 0
        w_OI[128:256] = 0
        assert NATIVE["csr"] <= sweep(base.pack(w_OI.to(dtype), "csr"), torch.randn(1100).to(dtype))


@needs_native
def test_blocks_with_more_rows_than_stand_side_by_side(isa):
    # The second shape has room for one panel of x at a time, the first for several.
    for o, i, r, c in ((24, 160, 12, 10), (32, 8192, 16, 32)):
        for dtype in (torch.bfloat16, torch.float32):
            packed, bias = matrix("block", o, i, dtype, {"r": r, "c": c}), torch.randn(o).to(dtype)
            run = dispatch.get("linear", "block", "blocks").prepare(packed, bias)
            for rows in (48, 64, 65, 129, 300):
                x = torch.randn(rows, i).to(dtype)
                check(run(x), x, packed, bias)


@needs_native
def test_blocks_are_only_for_numbers_that_can_be_multiplied():
    plan = cpu_backend.Plan(matrix("block", 8, 16, torch.float16), None)
    with pytest.raises(ValueError, match="only for blocks of bfloat16 or float32"):
        cpu_backend.native.run_blocks(plan.handle, 0, 0, 0, 1)
    plan = cpu_backend.Plan(matrix("bitmask", 8, 16, torch.float32), None)
    with pytest.raises(ValueError, match="only for blocks"):
        cpu_backend.native.run_blocks(plan.handle, 0, 0, 0, 1)


@needs_native
def test_columns_beyond_sixteen_bits(isa):
    for dtype in (torch.bfloat16, torch.float32):
        packed = matrix("csr", 20, 65600, dtype, density=0.01)
        assert packed.tensors["columns"].dtype is torch.int32
        for rows in (1, 5):
            x = torch.randn(rows, 65600).to(dtype)
            check(dispatch.get("linear", "csr", "tiles").prepare(packed, None)(x), x, packed, None)


@needs_native
@pytest.mark.parametrize("layout", ["bitmask", "block", "csr"])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_matrices(isa, layout, density):
    for dtype in (torch.bfloat16, torch.float32):
        packed = matrix(layout, 24, 72, dtype, density=density)
        sweep(packed, None)
        run = dispatch.get("linear", layout, few(layout)).prepare(packed, torch.full((24,), 3.0))
        if not density:
            assert (run(torch.randn(2, 72).to(dtype)) == 3).all()


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", WITH_DENSE)
def test_as_many_threads_as_torch_has_give_the_same_bits(isa, layout, dtype):
    # Large enough that threads are used at all; the uneven rows make odd shares.
    packed = matrix(layout, 516, 1024, dtype)
    for name in NATIVE[layout]:
        run = dispatch.get("linear", layout, name).prepare(packed, None)
        for rows in (1, 3, 6, 16, 40):
            if name == "decode" and rows > cpu_backend.DECODE_ROWS[layout]:
                continue
            x = torch.randn(rows, 1024).to(dtype)
            torch.set_num_threads(1)
            alone = run(x)
            check(alone, x, packed, None)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                if name != "panel":
                    assert torch.equal(run(x), alone)
                else:
                    check(run(x), x, packed, None)


@needs_native
def test_panel_of_many_slices_and_float16(monkeypatch, isa):
    monkeypatch.setattr(planned, "PANEL_BYTES", 1)
    for layout in ("bitmask", "block", "nm"):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            packed = matrix(layout, 200, 64, dtype)
            bias, x = torch.randn(200).to(dtype), torch.randn(9, 64).to(dtype)
            check(dispatch.get("linear", layout, "panel").prepare(packed, bias)(x), x, packed, bias)


@needs_native
def test_threads_of_its_own_where_torch_lends_none():
    packed = matrix("bitmask", 512, 1024, torch.float32)
    run = dispatch.get("linear", "bitmask", "decode").prepare(packed, None)
    x = torch.randn(3, 1024)
    want = run(x)
    torch.set_num_threads(3)
    cpu_backend.native.set_parallel_for(0)
    try:
        wrong = []

        def work():
            torch.set_num_threads(3)
            wrong.extend(1 for _ in range(50) if not torch.equal(run(x), want))

        workers = [threading.Thread(target=work) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        cpu_backend._use_torch_threads()
    assert not wrong


@needs_native
@pytest.mark.parametrize("layout", WITH_DENSE)
def test_x_may_lie_anyhow_but_must_fit(layout):
    packed = matrix(layout, 16, 64, torch.float32)
    run = dispatch.get("linear", layout, few(layout)).prepare(packed, None)
    columns, strided = torch.randn(64, 4).t(), torch.randn(4, 128)[:, ::2]
    for x in (columns, strided):
        assert not x.is_contiguous()
        check(run(x), x, packed, None)
    for name in NATIVE[layout]:
        run = dispatch.get("linear", layout, name).prepare(packed, None)
        for x in (torch.randn(2, 63), torch.randn(2, 64).bfloat16()):
            with pytest.raises(PumiceError, match=r"takes \[rows, 64\] torch.float32"):
                run(x)


@needs_native
@pytest.mark.parametrize("layout", ANYHOW)
def test_not_a_number_is_not_hidden(isa, layout):
    packed = matrix(layout, 8, 64, torch.bfloat16, density=1.0)
    for rows in (2, 7):
        x = torch.randn(rows, 64).bfloat16()
        x[1, 5] = float("nan")
        y = dispatch.get("linear", layout, few(layout)).prepare(packed, None)(x)
        assert y[0].isfinite().all()
        assert y[1].isnan().all()
        assert y[2:].isfinite().all()


@needs_native
def test_positions_that_point_outside_are_refused():
    packed = matrix("bitmask", 8, 64, torch.float32)
    packed.tensors["values"] = packed.tensors["values"][:-1]
    with pytest.raises(PumiceError, match="as many bits set as there are values"):
        cpu_backend.Plan(packed, None)
    for name, spoil in (("columns", 99), ("columns", -1), ("row_starts", 99)):
        packed = matrix("block", 8, 64, torch.float32)
        packed.tensors[name] = packed.tensors[name].clone()
        packed.tensors[name][1] = spoil
        with pytest.raises(PumiceError, match="point outside"):
            cpu_backend.Plan(packed, None)
    for name, spoil in (("columns", 64), ("row_starts", 9999), ("row_starts", -1)):
        packed = matrix("csr", 8, 64, torch.float32)
        packed.tensors[name] = packed.tensors[name].clone()
        packed.tensors[name][1] = spoil
        with pytest.raises(PumiceError, match="point outside"):
            dispatch.get("linear", "csr", "tiles").prepare(packed, None)
    packed = matrix("csr", 8, 64, torch.float32)
    packed.tensors["columns"] = packed.tensors["columns"][:-1]
    with pytest.raises(PumiceError, match="damaged"):
        dispatch.get("linear", "csr", "tiles").prepare(packed, None)
    packed = matrix("nm", 8, 64, torch.float32)
    packed.tensors["codes"] = torch.full_like(packed.tensors["codes"], 255)
    with pytest.raises(PumiceError, match="no choice of positions"):
        cpu_backend.Plan(packed, None)
    packed.tensors["values"] = packed.tensors["values"][:, 1:]
    with pytest.raises(PumiceError, match="values are stored"):
        cpu_backend.Plan(packed, None)


@needs_native
@pytest.mark.parametrize(("layout", "make"), [("nm", "nm_bitmask"), ("csr", "fill_tiles")])
def test_what_is_derived_is_made_once_counted_and_made_again_after_a_change(layout, make, monkeypatch):
    from pumice.engine.bench import model_bytes
    from pumice.weights.modules import SparseLinear

    native, made = cpu_backend.native, []

    class Counted:
        def __getattr__(self, name):
            if name == make:
                made.append(name)
            return getattr(native, name)

    monkeypatch.setattr(cpu_backend, "native", Counted())
    torch.use_deterministic_algorithms(False)
    layer = SparseLinear(matrix(layout, 64, 128, torch.float32, density=0.1))
    stored = model_bytes(layer)
    assert layer.derived_nbytes == 0
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for rows in (1, 40, 2):
        x = torch.randn(rows, 128)
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), F.linear(x, layer.dense_weight()), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))
    assert len(made) == 1
    least = 64 * 128 // 8 if layout == "nm" else 5 * int((layer.values != 0).sum())
    assert least <= layer.derived_nbytes <= 4 * least
    assert model_bytes(layer) == stored + layer.derived_nbytes
    with torch.no_grad():
        layer.values.mul_(2)
        torch.testing.assert_close(layer(x), F.linear(x, layer.dense_weight()), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled(x), layer(x))


@needs_native
def test_nothing_is_read_beyond_the_tensors():
    check_guarded("""
        from pumice.kernels import csr_cpu
        for _ in forced():
            for dtype in (torch.bfloat16, torch.float32):
                for layout, params, o, i in (("bitmask", {}, 5, 64), ("bitmask", {}, 3, 200), ("bitmask", {}, 4, 7),
                                             ("block", {"r": 4, "c": 8}, 8, 64), ("block", {"r": 2, "c": 33}, 8, 66),
                                             ("block", {"r": 9, "c": 6}, 18, 66), ("block", {"r": 16, "c": 1}, 16, 7),
                                             ("nm", {"n": 2, "m": 4}, 5, 64), ("nm", {"n": 2, "m": 3}, 4, 9),
                                             ("csr", {}, 5, 64), ("csr", {}, 33, 300), ("csr", {}, 4, 7)):
                    w_OI = torch.randn(o, i)
                    if layout == "nm":
                        w_OI = w_OI.unflatten(1, (-1, params["m"]))
                        w_OI[..., params["n"]:] = 0
                        w_OI = w_OI.flatten(1)
                    packed = base.pack(w_OI.to(dtype), layout, **params)
                    packed.tensors = {name: at_the_end(tensor) for name, tensor in packed.tensors.items()}
                    if layout == "csr":
                        # The kernels read the tiles: those must not be left either.
                        tiles = csr_cpu._tiles(packed, *packed.tensors.values())
                        ends = [at_the_end(part) if isinstance(part, torch.Tensor) else part for part in tiles]
                        csr_cpu.tiles_of = lambda packed, ends=ends: csr_cpu.Tiles(*ends)
                    names = {"csr": ("tiles",), "block": ("decode", "blocks", "panel")}.get(layout, ("decode", "panel"))
                    for name in names:
                        run = dispatch.get("linear", layout, name).prepare(packed, None)
                        for rows in (1, 2, 3, 9, 20):
                            if name == "decode" and rows > cpu_backend.DECODE_ROWS[layout]:
                                continue
                            run(at_the_end(torch.randn(rows, i).to(dtype)))
    """)


def test_reading_on_would_be_seen():
    # A sanitizer that is loaded takes the signal, and says so.
    with pytest.raises(AssertionError, match=r"exit -11|AddressSanitizer"):
        check_guarded("""
            import ctypes
            tensor = at_the_end(torch.zeros(5))
            ctypes.string_at(tensor.data_ptr(), 20)
            ctypes.string_at(tensor.data_ptr(), 21)
        """)


def test_row_starts_with_and_without_the_extension(monkeypatch):
    mask = torch.rand(7, 77) < 0.4
    bits, want = base.pack_bits(mask), torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    assert torch.equal(cpu_backend.row_starts(bits, 77), want)
    monkeypatch.setattr(cpu_backend, "native", None)
    assert torch.equal(cpu_backend.row_starts(bits, 77), want)


def test_without_the_extension_everything_runs_and_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(cpu_backend, "native", None)
    monkeypatch.setattr(cpu_backend, "_why", "no such module")
    packed = matrix("bitmask", 16, 64, torch.bfloat16)
    call = dispatch.Call("linear", "bitmask", torch.bfloat16, "cpu", 1, (16, 64))
    reasons = {backend.name: reason for backend, reason in dispatch.candidates(call)}
    assert reasons["unpack"] is None
    assert "not built when Pumice was installed (no such module)" in str(reasons["decode"])
    assert "install a C++ compiler" in str(reasons["panel"])
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(ops.traced_linear(packed, None, x), reference.linear(x, packed))
    assert features.features()["native_missing"]
    with pytest.raises(PumiceError, match="cannot be forced"):
        cpu_backend.force("avx2")


@needs_native
def test_forcing_names_what_can_be_forced():
    with pytest.raises(
        PumiceError, match=r"instruction set 'mmx' cannot run here \(unknown\): choose one of .*portable"
    ):
        cpu_backend.force("mmx")


@pytest.mark.skipif(sys.platform == "win32", reason="sets the compiler as Unix does")
def test_installation_succeeds_without_a_compiler_and_says_what_is_lost(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "obj")],
        env={"PATH": "/usr/bin:/bin", "CC": "false", "CXX": "false", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the C++ kernels were not built" in done.stderr


@pytest.mark.parametrize("layout", WITH_DENSE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_pytorch_brings_along(layout, dtype):
    packed = matrix(layout, 24, 64, dtype, {} if layout == "dense" else None)
    for bias in (None, torch.randn(24).to(dtype)):
        for rows in (1, 5):
            x = torch.randn(rows, 64).to(dtype)
            for backend in backends_for(packed, rows):
                check(backend.prepare(packed, bias)(x), x, packed, bias)


def test_reference_convolution_and_positions():
    conv = torch.nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
    with torch.no_grad():
        conv.weight.mul_(torch.rand_like(conv.weight) < 0.5)
    packed = base.pack(conv.weight.detach().flatten(1), "bitmask")
    x = torch.randn(2, 6, 9, 9)
    y = reference.conv2d(x, packed, conv.bias, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=2)
    assert torch.equal(y, conv(x))
    for layout, params in LAYOUTS.items():
        packed = matrix(layout, 16, 32, torch.float32, params)
        values = base.unpack(packed).flatten()[reference.positions(packed)]
        assert torch.equal(values, packed.tensors["values"].flatten())


def operands(packed: base.Packed, x: torch.Tensor, bias: torch.Tensor | None):
    stored = packed.tensors
    if packed.layout == "bitmask":
        starts = ops.row_starts(stored["bitmask"], packed.shape[1])
        return ops.linear_bitmask, (x, stored["values"], stored["bitmask"], starts, bias)
    if packed.layout == "nm":
        return ops.linear_nm, (x, stored["values"], stored["codes"], bias, packed.params["n"], packed.params["m"])
    op = ops.linear_block if packed.layout == "block" else ops.linear_csr
    return op, (x, stored["values"], stored["columns"], stored["row_starts"], bias)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_keep_torch_s_rules(layout):
    torch.use_deterministic_algorithms(False)
    packed = matrix(layout, 16, 32, torch.float32)
    packed.tensors["values"].requires_grad_()
    x = torch.randn(3, 32, requires_grad=True)
    torch.library.opcheck(*operands(packed, x, torch.randn(16, requires_grad=True)))
    torch.library.opcheck(*operands(packed, x, None))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_to_x_values_and_bias(layout):
    packed = matrix(layout, 8, 16, torch.float64)
    stored = packed.tensors.pop("values")

    def product(x, values, bias):
        restored = base.Packed(layout, packed.shape, values.dtype, {"values": values, **packed.tensors}, packed.params)
        return ops.traced_linear(restored, bias, x)

    inputs = [torch.randn(3, 16).double(), stored.clone(), torch.randn(8).double()]
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_those_of_a_masked_dense_layer(layout, dtype):
    packed = matrix(layout, 16, 32, dtype)
    places = reference.positions(packed)
    values = packed.tensors["values"].requires_grad_()
    x, bias, g = (torch.randn(n).to(dtype).requires_grad_() for n in ((5, 32), (16,), (5, 16)))
    ops.traced_linear(packed, bias, x).backward(g.detach())
    x2, bias2 = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    weight = base.unpack(packed).detach().clone().requires_grad_()
    F.linear(x2, weight, bias2).backward(g.detach())
    assert x.grad is not None
    assert values.grad is not None
    assert weight.grad is not None
    tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(x.grad, x2.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(bias.grad, bias2.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(values.grad.flatten(), weight.grad.flatten()[places], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ANYHOW)
def test_compiles_into_one_graph_shared_by_layers_of_one_shape(layout):
    torch.use_deterministic_algorithms(False)
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda packed, x: ops.traced_linear(packed, None, x).relu(), backend=count, fullgraph=True)
    x = torch.randn(3, 32)
    for density in (0.3, 0.5, 0.6, 0.7):
        packed = matrix(layout, 16, 32, torch.float32, density=density)
        torch.testing.assert_close(compiled(packed, x), reference.linear(x, packed).relu())
    assert len(graphs) <= 2  # the second size makes the payload's length symbolic, the rest share that graph


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_step_compiles(layout):
    torch.use_deterministic_algorithms(False)
    packed = matrix(layout, 16, 32, torch.float32)
    values = packed.tensors["values"].requires_grad_()

    def loss(x):
        return ops.traced_linear(packed, None, x).square().sum()

    x = torch.randn(3, 32)
    loss(x).backward()
    want, values.grad = values.grad, None
    torch.compile(loss, backend="aot_eager", fullgraph=True)(x).backward()
    torch.testing.assert_close(values.grad, want)


def test_machine_stamp_is_plain_data():
    stamp = json.loads(json.dumps(features.machine_stamp()))
    assert stamp["torch"] == torch.__version__
    assert stamp["threads"] == torch.get_num_threads()
    assert stamp["cpu"]
    known = features.features()
    assert set(known["kernels"]) == (set(ISAS) if known["native"] else set())
