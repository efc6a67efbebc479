"""`csr-tiles`: the very tiles that C++ makes of `csr`, in the place of the stored form."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import pumice
from pumice.core.errors import PumiceError
from pumice.engine import layer_timing
from pumice.kernels import cpu_backend, csr_cpu, ops, reference
from pumice.weights.layouts import base
from pumice.weights.modules import SparseLinear
from tests.test_kernels import NATIVE, check, needs_native, sweep

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = ((1, 1), (3, 7), (33, 300), (130, 256), (40, 513), (300, 1024), (0, 32), (16, 0))


def zeroed(o, i, density, dtype=torch.bfloat16):
    w = torch.randn(o, i) * (torch.rand(o, i) < density)
    # Numbers in the first columns, alone and together, beside rows that have none.
    w[::3, :2] = 0
    if o and i:
        w[0, 0] = 1
    if o > 2 and i > 1:
        w[1, :2], w[2, :2] = torch.tensor([0.0, 1.0]), 1
    return w.to(dtype)


def cases():
    for o, i in SHAPES:
        for density in (0.0, 0.05, 0.5, 1.0):
            for dtype in (torch.bfloat16, torch.float32):
                yield zeroed(o, i, density, dtype)


def test_it_is_csr_again_in_files():
    for w in cases():
        packed, csr = base.pack(w, "csr-tiles"), base.pack(w, "csr")
        base.validate(packed)
        assert torch.equal(base.unpack(packed), w)
        stored = base.layout_named("csr-tiles").for_files(packed)
        assert all(torch.equal(stored.tensors[name], tensor) for name, tensor in csr.tensors.items())
        assert torch.equal(packed.numbers.sort().values, csr.numbers.sort().values)


@needs_native
def test_it_is_what_the_kernels_make_of_csr():
    for w in cases():
        ours, made = (csr_cpu.tiles_of(base.pack(w, name)) for name in ("csr-tiles", "csr"))
        for name in ("values", "columns", "order", "steps", "starts"):
            assert torch.equal(getattr(ours, name).flatten(), getattr(made, name).flatten()), (w.shape, name)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels_run_it_without_a_copy(dtype):
    for density in (0.0, 0.1, 0.6):
        packed = base.pack(zeroed(130, 600, density, dtype), "csr-tiles")
        assert NATIVE["csr"] <= sweep(packed, torch.randn(130).to(dtype))
        plan = csr_cpu.TilePlan(packed, None)
        assert plan.keep[0].values.data_ptr() == packed.tensors["values"].data_ptr()
        layer = SparseLinear(packed)
        layer(torch.randn(1, 600).to(dtype))
        assert layer.derived_nbytes == 0


def test_gradients_reach_the_numbers_and_nothing_that_only_fills_up():
    torch.use_deterministic_algorithms(False)
    packed = base.pack(zeroed(40, 300, 0.2, torch.float32), "csr-tiles")
    values = packed.tensors["values"].clone().requires_grad_()
    x, bias = torch.randn(5, 300, requires_grad=True), torch.randn(40, requires_grad=True)
    structure = [packed.tensors[name] for name in ("offsets", "order", "steps")]
    torch.library.opcheck(ops.linear_csr_tiles, (x, values, *structure, bias, 40))
    held = base.Packed("csr-tiles", (40, 300), torch.float32, {**packed.tensors, "values": values})
    y = ops.traced_linear(held, bias, x)
    found = torch.autograd.grad(y.square().sum(), (x, values, bias))
    dense = base.unpack(packed).requires_grad_()
    want = torch.autograd.grad(F.linear(x, dense, bias).square().sum(), (x, dense, bias))
    places = reference.positions(packed)
    torch.testing.assert_close(found[0], want[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2], want[2], rtol=1e-4, atol=1e-4)
    real = places >= 0
    assert int(real.sum()) == int((dense != 0).sum())
    torch.testing.assert_close(found[1][real], want[1].flatten()[places[real]], rtol=1e-4, atol=1e-4)
    assert not found[1][~real].any()


def test_a_step_of_training_keeps_the_matrix_whole():
    torch.use_deterministic_algorithms(False)
    w = zeroed(64, 520, 0.1, torch.float32)
    layers = [SparseLinear(base.pack(w, name)) for name in ("csr-tiles", "csr")]
    x = torch.randn(8, 520)
    for layer in layers:
        layer.values.requires_grad_()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (layer(x) - 1).square().mean().backward()
            optimizer.step()
        base.validate(layer.packed)
    torch.testing.assert_close(layers[0].dense_weight(), layers[1].dense_weight(), rtol=1e-3, atol=1e-3)
    with torch.inference_mode():
        torch.testing.assert_close(layers[0](x), layers[1](x), rtol=1e-3, atol=1e-2)


def test_a_damaged_matrix_is_refused():
    packed = base.pack(zeroed(70, 600, 0.2), "csr-tiles")

    def broken(name, change):
        tensor = packed.tensors[name].clone()
        change(tensor)
        return base.Packed(packed.layout, packed.shape, packed.dtype, {**packed.tensors, name: tensor})

    def twice(order):
        order[0, 0, 1] = order[0, 0, 0]

    def more(steps):
        steps[0, 0, 0] += 1

    def turned(steps):
        steps[0, 0] = steps[0, 0].flip(0)

    def far(offsets):
        offsets.fill_(255)

    def shifted(offsets):
        offsets.copy_(offsets.roll(1))

    for name, change, message in (
        ("order", twice, "twice"),
        ("steps", more, "steps do not match"),
        ("steps", turned, "order of their numbers"),
        ("offsets", far, "outside|ascend"),
        ("offsets", shifted, "outside|ascend"),
        ("values", lambda values: values.fill_(1), "ascend"),
    ):
        with pytest.raises(PumiceError, match=message):
            base.validate(broken(name, change))
    if cpu_backend.native is not None:
        csr_cpu.TilePlan(packed, None)  # what is derived from good steps does not hide what is cut off later
        for spoiled in (broken("order", twice), broken("steps", more)):
            with pytest.raises(PumiceError, match="damaged"):
                csr_cpu.TilePlan(spoiled, None)
        cut = {**packed.tensors, "offsets": packed.tensors["offsets"][:-1]}
        with pytest.raises(PumiceError, match="damaged"):
            csr_cpu.TilePlan(base.Packed(packed.layout, packed.shape, packed.dtype, cut), None)


def test_copies_pickles_and_other_types_run_and_files_have_csr(tmp_path):
    torch.use_deterministic_algorithms(False)
    w = zeroed(64, 300, 0.03)
    layer, x = SparseLinear(base.pack(w, "csr-tiles")), torch.randn(2, 300)
    layer.set_backends([(None, "tiles")])
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        if cpu_backend.native is not None:
            check(one(x.bfloat16()), x.bfloat16(), layer.packed, None)
    with torch.no_grad():
        compiled = torch.compile(SparseLinear(base.pack(w, "csr-tiles")), backend="aot_eager", fullgraph=True)
        check(compiled(x.bfloat16()), x.bfloat16(), layer.packed, None)
    pumice.save(torch.nn.Sequential(layer), tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text()
    assert "csr" in text
    assert "csr-tiles" not in text
    check(layer.half()(x.half()), x.half(), layer.packed, None)


@needs_native
def test_pack_times_it_beside_the_stored_form():
    w = torch.randn(256, 512) * (torch.rand(256, 512) < 0.05)
    found = layer_timing._layouts(base.pack(w.bfloat16(), "csr"))
    tiles = next(one for one in found if one.layout == "csr-tiles")
    assert tiles.nbytes < found[1].nbytes
    assert found[1].layout == "csr"
