"""Four-bit integers in lanes: the layout is another order of the stored one, and its kernels agree with the specification."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import pumice
from pumice.core import dispatch
from pumice.core.errors import PumiceError
from pumice.kernels import cpu_backend, lanes_cpu
from pumice.weights.grid import Coding
from pumice.weights.layouts import base
from pumice.weights.layouts.lanes import Lanes, Places, lane_height, places
from pumice.weights.modules import SparseLinear, replace_module
from tests.test_coded_kernels import check
from tests.test_kernels import needs_native

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = ((0, 32), (16, 0), (1, 16), (3, 48), (33, 160), (130, 128), (7, 1056), (300, 4096), (1100, 640))
needs_lanes = pytest.mark.skipif(
    cpu_backend.native is None or not cpu_backend.native.has_lanes(), reason="no products of bytes in fours here"
)


def rounded(o, i, group, density, dtype):
    w = torch.randn(o, i) * (torch.rand(o, i // group) < density).repeat_interleave(group, 1)
    grid = Coding("int4", 4, group).grid(w)
    return grid.snap(w).to(dtype), grid


def matrix(layout, o, i, dtype, group=16, density=0.5) -> base.Packed:
    w, grid = rounded(o, i, group, density, dtype)
    return base.pack(w, layout, grid=grid, group=group)


def cases():
    for o, i in SHAPES:
        for group in (16, 32):
            if i % group == 0:
                yield o, i, group


@needs_lanes
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("layout", lanes_cpu.LAYOUTS)
def test_kernels_agree_with_the_specification(layout, density):
    for o, i, group in cases():
        packed, bias = matrix(layout, o, i, torch.bfloat16, group, density), torch.randn(o).bfloat16()
        for name in ("lanes", "panel"):
            run = dispatch.get("linear", layout, name).prepare(packed, bias)
            for rows in (0, 1, 2, 3, 4, 5, 9):
                x = torch.randn(rows, i).bfloat16()
                check(run(x), x, packed, bias)


@needs_lanes
@pytest.mark.parametrize("layout", lanes_cpu.LAYOUTS)
def test_panels_are_the_very_matrix_and_threads_give_the_same_bits(layout):
    for o, i, group in cases():
        packed = matrix(layout, o, i, torch.bfloat16, group)
        plan, out = lanes_cpu.LanePlan(packed, None), torch.empty(o, i, dtype=torch.bfloat16)
        cpu_backend.native.expand_lanes(plan.handle, 0, o, out.data_ptr(), 2)
        assert torch.equal(out, base.unpack(packed))
    packed, x = matrix(layout, 516, 1024, torch.bfloat16), torch.randn(3, 1024).bfloat16()
    run = dispatch.get("linear", layout, "lanes").prepare(packed, None)
    alone = run(x)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(run(x), alone)


@needs_lanes
@pytest.mark.parametrize(("threads", "height"), [(1, 256), (2, 128)])
def test_chunks_are_for_the_threads_there_were(threads, height):
    torch.set_num_threads(threads)
    w, grid = rounded(1040, 512, 16, 0.5, torch.bfloat16)
    packed = base.pack(w, "int4-bitmask-lanes", grid=grid, group=16)
    assert packed.tensors["order"].shape[-1] == height
    assert packed.nbytes == base.layout_named(packed.layout).stored_bytes(w, grid=grid, group=16)
    x = torch.randn(3, 512).bfloat16()
    for later in (1, 3):
        torch.set_num_threads(later)
        assert base.layout_named(packed.layout).fault(packed) is None
        assert torch.equal(base.unpack(packed), w)
        check(dispatch.get("linear", packed.layout, "lanes").prepare(packed, None)(x), x, packed, None)


@needs_lanes
def test_x_is_read_in_sixteen_bits():
    """What a row of x loses is at most half of its unit, whatever else stands in it; products themselves are exact."""
    w_OI, grid = rounded(64, 512, 32, 1.0, torch.bfloat16)
    packed = base.pack(w_OI, "int4-lanes", grid=grid, group=32)
    run = dispatch.get("linear", "int4-lanes", "lanes").prepare(packed, None)
    x = torch.randn(4, 512)
    x[1, 7] = 1000
    x[2] = 0
    x[3] *= 1e-20
    x = x.bfloat16()
    exact = base.unpack(packed.astype(torch.float64))
    want = F.linear(x.double(), exact)
    unit = x.double().abs().amax(1, keepdim=True) / 32767
    # Sums are in fp32, and so is what is taken off for moving x up; y is rounded to bf16.
    sums = 1e-6 * F.linear(unit.expand_as(x) * 32768, exact.abs())
    bound = F.linear(unit.expand_as(x) / 2, exact.abs()) + sums + want.abs() / 256
    y = run(x)
    assert ((y.double() - want).abs() <= bound).all()
    assert not y[2].any()


@needs_lanes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_nan_and_the_others_are_not(bad):
    for layout in lanes_cpu.LAYOUTS:
        packed = matrix(layout, 40, 160, torch.bfloat16)
        x = torch.randn(3, 160).bfloat16()
        x[1, 5] = bad
        y = dispatch.get("linear", layout, "lanes").prepare(packed, None)(x)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("layout", lanes_cpu.LAYOUTS)
def test_the_integers_are_those_of_the_stored_form(layout):
    plain = layout.removesuffix("-lanes")
    for o, i, group in cases():
        w, grid = rounded(o, i, group, 0.4, torch.bfloat16)
        packed, stored = (base.pack(w, name, grid=grid, group=group) for name in (layout, plain))
        again, lanes = base.layout_named(layout).plain(packed)
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in stored.tensors.items())
        assert lanes.unique().numel() == len(stored.tensors["scales"])
        assert torch.equal(packed.numbers, stored.numbers)
        sums = lanes_cpu.row_sums(packed)
        assert torch.allclose(sums, base.unpack(packed.astype(torch.float32)).sum(1), atol=1e-4 * i**0.5)


def test_rows_of_like_length_stand_side_by_side():
    kept = torch.rand(1024, 256) < torch.rand(1024, 1)
    made, lanes = places(kept)
    height = lane_height(1024)
    assert made.order.shape == (1024 // height, 16, height)
    stored = int(made.steps.sum(dtype=torch.int64)) * 16
    assert lanes.unique().numel() == lanes.numel() == int(kept.sum())
    # Little is filled up although rows are of all lengths.
    assert stored < 1.15 * int(kept.sum())
    rows = made.rows().flatten()[lanes]
    assert torch.equal(rows, kept.nonzero()[:, 0])
    assert torch.equal(made.tiles()[lanes // 16], kept.nonzero()[:, 1] // 16)


def test_a_damaged_matrix_is_refused():
    packed = matrix("int4-bitmask-lanes", 70, 640, torch.bfloat16)
    base.validate(packed)

    def broken(name, change):
        tensor = packed.tensors[name].clone()
        change(tensor)
        return base.Packed(packed.layout, packed.shape, packed.dtype, {**packed.tensors, name: tensor}, packed.params)

    def far(groups):
        groups.fill_(255)

    def twice(order):
        order[0, 0, 1] = order[0, 0, 0]

    def more(steps):
        steps[0, 0, 0] += 1

    def infinite(scales):
        scales[0, 0] = float("inf")

    faults = {
        "groups": (far, "outside|twice"),
        "order": (twice, "twice"),
        "steps": (more, "steps"),
        "scales": (infinite, "NaN"),
    }
    for name, (change, message) in faults.items():
        with pytest.raises(PumiceError, match=message):
            base.validate(broken(name, change), "w")
    short = {**packed.tensors, "codes": packed.tensors["codes"][:-1]}
    with pytest.raises(PumiceError, match="steps"):
        base.validate(base.Packed(packed.layout, packed.shape, packed.dtype, short, packed.params))
    if cpu_backend.native is not None:
        for name in ("order", "steps", "groups", "scales"):
            cut = {**packed.tensors, name: packed.tensors[name][:-1]}
            with pytest.raises(PumiceError, match="damaged"):
                lanes_cpu.LanePlan(base.Packed(packed.layout, packed.shape, packed.dtype, cut, packed.params), None)
        with pytest.raises(PumiceError, match="damaged"):
            lanes_cpu.LanePlan(base.Packed(packed.layout, packed.shape, packed.dtype, short, packed.params), None)
        with pytest.raises(PumiceError, match="damaged"):
            lanes_cpu.LanePlan(broken("steps", more), None)
        with pytest.raises(PumiceError, match="bfloat16 only"):
            lanes_cpu.LanePlan(packed.astype(torch.float32), None)


def test_groups_of_other_sizes_and_zero_points_are_refused():
    w, grid = rounded(16, 128, 64, 1.0, torch.bfloat16)
    with pytest.raises(PumiceError, match="16 or 32"):
        base.pack(w, "int4-lanes", grid=grid, group=64)
    coding = Coding("int4", 4, 16, True)
    grid = coding.grid(torch.randn(16, 64))
    with pytest.raises(PumiceError, match="zero points"):
        base.pack(grid.snap(torch.randn(16, 64)), "int4-lanes", grid=grid, group=16)


@pytest.mark.parametrize("layout", lanes_cpu.LAYOUTS)
def test_gradients_go_to_x_and_scales(layout):
    packed = matrix(layout, 40, 96, torch.float32)
    scales = packed.tensors["scales"].clone().requires_grad_()
    x = torch.randn(5, 96, requires_grad=True)
    held = base.Packed(layout, packed.shape, packed.dtype, {**packed.tensors, "scales": scales}, packed.params)
    y = dispatch.traced("linear", held, None, x)
    g = torch.randn_like(y)
    y.backward(g)
    assert torch.allclose(x.grad, g @ base.unpack(packed), atol=1e-4)
    nudged = packed.tensors["scales"].clone()
    step, lane = next((s, lane) for s, lane in packed.tensors["scales"].nonzero().tolist())
    nudged[step, lane] += 1
    more = base.Packed(layout, packed.shape, packed.dtype, {**packed.tensors, "scales": nudged}, packed.params)
    slope = (g * (x.detach() @ (base.unpack(more) - base.unpack(packed)).t())).sum()
    assert torch.allclose(scales.grad[step, lane], slope, rtol=1e-3, atol=1e-3)


@needs_native
def test_other_instruction_sets_say_so_and_run_otherwise():
    packed = matrix("int4-lanes", 32, 64, torch.bfloat16)
    x = torch.randn(2, 64).bfloat16()
    layer = SparseLinear(packed)
    want = F.linear(x, base.unpack(packed))
    plan = lanes_cpu.LanePlan(packed, None) if cpu_backend.native.has_lanes() else None
    cpu_backend.force("portable")
    try:
        call = dispatch.Call("linear", "int4-lanes", torch.bfloat16, "cpu", 1, (32, 64), {"group": 16})
        reasons = {backend.name: reason for backend, reason in dispatch.candidates(call)}
        assert "VNNI" in str(reasons["lanes"])
        assert torch.equal(layer(x), want)
        with pytest.raises(PumiceError, match="VNNI"):
            lanes_cpu.LanePlan(packed, None)
        if plan is not None:
            with pytest.raises(ValueError, match="no lanes"):
                cpu_backend.native.run_lanes(plan.handle, 0, 0, 0, 1)
    finally:
        cpu_backend.force(None)


def test_files_have_the_stored_form(tmp_path):
    torch.manual_seed(0)
    w, grid = rounded(64, 128, 16, 0.5, torch.bfloat16)
    packed = base.pack(w, "int4-bitmask-lanes", grid=grid, group=16)
    model = torch.nn.Sequential(SparseLinear(packed))
    pumice.save(model, tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text()
    assert "int4-bitmask" in text
    assert "lanes" not in text
    assert not [name for name in Places._fields if f"0.{name}" in text]
    assert issubclass(base.layout_named("int4-bitmask-lanes"), Lanes)


@pytest.mark.parametrize("layout", lanes_cpu.LAYOUTS)
def test_copies_pickles_and_other_types_run(layout):
    packed = matrix(layout, 48, 64, torch.bfloat16)
    layer, x = SparseLinear(packed), torch.randn(2, 64)
    layer.set_backends([(16, "lanes"), (None, "panel")])
    want = F.linear(x, base.unpack(packed.astype(torch.float32)))
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.allclose(one(x.bfloat16()).float(), want, rtol=0.05, atol=0.05)
    again = SparseLinear(base.Packed.empty(packed.describe(), "cpu"))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.dense_weight(), layer.dense_weight())
    assert torch.allclose(layer.float()(x), want, atol=1e-4)
    assert layout in repr(SparseLinear(base.Packed.empty(packed.describe())))


@needs_lanes
def test_a_decoder_takes_its_tokens_through_lanes_and_saves_the_stored_form(tmp_path):
    from transformers import AutoModelForCausalLM

    from tests import tiny

    model = tiny.llama().bfloat16().eval()
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    grid = Coding("int4", 4, 16).grid(linear.weight.detach().float())
                    rounded_OI = grid.snap(linear.weight.detach())
                    packed = base.pack(rounded_OI, "int4-lanes", grid=grid, group=16)
                    setattr(parent, name, SparseLinear.from_module(linear, packed))
    exact = pumice.unpack(copy.deepcopy(model)).float()
    pumice.fuse(model)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        past = model(ids[:, :8], use_cache=True).past_key_values
        found = model(ids[:, 8:], past_key_values=past, use_cache=True).logits[0, -1].float()
        want = exact(ids).logits[0, -1]
    assert (found - want).norm() <= 0.05 * want.norm()
    pumice.save(model, tmp_path / "in")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.bfloat16)
    for name, module in list(loaded.named_modules()):
        if isinstance(module, SparseLinear):
            replace_module(loaded, name, SparseLinear(base.repack(module.packed, "int4-lanes", group=16)))
    loaded.save_pretrained(tmp_path / "out")
    config = (tmp_path / "out" / "config.json").read_text()
    assert '"int4"' in config
    assert "lanes" not in config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert {m.layout for m in again.modules() if isinstance(m, SparseLinear)} == {"int4"}
    with torch.no_grad():
        assert (again(ids).logits[0, -1].float() - want).norm() <= 0.05 * want.norm()
