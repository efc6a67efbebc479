"""`grouped_linear`: against independent dense products, with gradients, odd shapes, empty experts and empty plans."""

import itertools

import pytest
import torch

from pumice.core import dispatch
from pumice.core.dispatch import Call
from pumice.core.errors import PumiceError
from pumice.kernels import grouped, reference
from pumice.moe import Plan
from pumice.moe.grouped import grouped_linear

FORMS = list(itertools.product((False, True), (False, True), (False, True)))
COUNTS = [(0, 3, 0, 5, 2), (1, 0, 0, 0, 0), (0, 0, 0, 0, 0), (2, 2, 2, 2, 2)]
WIDTHS = [(7, 5), (16, 24), (1, 1), (32, 8)]


def case(counts, inputs, outputs, gather, scatter, bias, dtype=torch.float64, tokens=6):
    """Arguments of `reference.grouped_linear` but for their order, and the expert of each assignment."""
    draw = torch.Generator().manual_seed(0)
    count = sum(counts)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=draw).to(dtype)

    token_A = torch.randint(0, tokens, (count,), generator=draw)
    expert_A = torch.repeat_interleave(torch.tensor(counts))
    offsets = torch.tensor([0, *counts]).cumsum(0)
    given = {
        "x": random(tokens if gather else count, inputs),
        "weight": random(len(counts), outputs, inputs),
        "offsets": offsets,
        "bias": random(len(counts), outputs) if bias else None,
        "gather": token_A if gather else None,
        "scatter": token_A if scatter else None,
        "scale": torch.rand(count, dtype=torch.float64, generator=draw).to(dtype) if scatter else None,
        "rows": tokens if scatter else 0,
    }
    return given, expert_A


def dense(given, expert_A):
    """The same by one matrix product for every expert with every row, and one-hot matrices, in float64."""
    x, weight = given["x"].double(), given["weight"].double()
    rows = x if given["gather"] is None else x[given["gather"]]
    every = torch.einsum("ai,eoi->aeo", rows, weight)
    if given["bias"] is not None:
        every = every + given["bias"].double()
    out = every[torch.arange(len(expert_A)), expert_A]
    if given["scatter"] is None:
        return out
    hot = torch.nn.functional.one_hot(given["scatter"], given["rows"]).double().t()
    return hot @ (out * given["scale"].double()[:, None])


def backends(dtype, given, expert_A):
    outputs, inputs = given["weight"].shape[1:]
    call = Call("grouped_linear", "dense", dtype, "cpu", len(expert_A), (outputs, inputs), {"experts": 5})
    return [backend for backend, reason in dispatch.candidates(call) if reason is None]


def poison():
    """Memory that PyTorch hands out next holds NaN."""
    kept = [torch.full((size,), torch.nan) for size in (8, 40, 64, 160, 256, 640, 1024)]
    del kept


@pytest.mark.parametrize(("inputs", "outputs"), WIDTHS)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_backend_agrees_with_dense_products(dtype, counts, inputs, outputs):
    for form in FORMS:
        given, expert_A = case(counts, inputs, outputs, *form, dtype=dtype)
        exact = dense(given, expert_A)
        plain = reference.grouped_linear(
            *(given[name] for name in ("x", "weight", "offsets", "bias", "gather", "scatter", "scale", "rows"))
        )
        # A backend may round once more than the reference, before it adds the bias, and sum in another order.
        rounding = 2 * torch.finfo(dtype).eps * exact.abs().max() if exact.numel() else 0.0
        allowed = max(2 * (plain.double() - exact).abs().max(), rounding) if exact.numel() else 0.0
        floor = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        assert (plain.double() - exact).abs().sum() <= exact.abs().sum() * floor
        for backend in backends(dtype, given, expert_A):
            poison()
            run = backend.prepare(given["weight"], given["bias"])
            out = run(given["x"], given["offsets"], given["gather"], given["scatter"], given["scale"], given["rows"])
            assert out.dtype == dtype
            assert out.shape == exact.shape
            if exact.numel():
                assert (out.double() - exact).abs().max() <= allowed, (backend.name, form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [one.name for one in dispatch.backends("grouped_linear")])
def test_every_backend_takes_transposed_weights(backend, dtype):
    given, expert_A = case(COUNTS[0], 16, 32, True, True, False, dtype=dtype)
    given["weight"] = given["weight"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not given["weight"].is_contiguous()
    found = {one.name: one for one in backends(dtype, given, expert_A)}
    if backend not in found:
        pytest.skip(f"{backend} refuses {dtype} here")
    run = found[backend].prepare(given["weight"], None)
    out = run(given["x"], given["offsets"], given["gather"], given["scatter"], given["scale"], given["rows"])
    torch.testing.assert_close(out.double(), dense(given, expert_A), atol=0.1, rtol=0.02)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("gather", "scatter", "bias"), FORMS)
def test_gradients(gather, scatter, bias, counts):
    given, _ = case(counts, 3, 4, gather, scatter, bias)
    names = [name for name in ("x", "weight", "bias", "scale") if given[name] is not None]
    leaves = [given[name].requires_grad_() for name in names]

    def run(*values):
        full = {**given, **dict(zip(names, values, strict=True))}
        return grouped.grouped_linear(**full)

    assert torch.autograd.gradcheck(run, leaves)
    # Where only some gradients are wanted another formula runs.
    for kept in range(len(leaves)):
        for place, leaf in enumerate(leaves):
            leaf.requires_grad_(place == kept)
        assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize(("gather", "scatter", "bias"), FORMS)
def test_the_operator_is_one_that_torch_can_trace(gather, scatter, bias):
    given, _ = case(COUNTS[0], 8, 8, gather, scatter, bias, dtype=torch.float32)
    for name in ("x", "weight", "scale"):
        given[name] = None if given[name] is None else given[name].requires_grad_()
    torch.library.opcheck(torch.ops.pumice.grouped_linear, tuple(given.values()))


def test_grouped_outer_is_the_sum_of_outer_products():
    given, expert_A = case(COUNTS[0], 16, 8, True, True, False, dtype=torch.float32)
    g_AO = torch.randn(len(expert_A), 8)
    x_AI = given["x"][given["gather"]]
    hot = torch.nn.functional.one_hot(expert_A, 5).float()
    wanted = torch.einsum("ae,ao,ai->eoi", hot, g_AO, x_AI)
    call = dispatch.Call("grouped_outer", "dense", torch.float32, "cpu", len(expert_A), (8, 16))
    able = [backend for backend, reason in dispatch.candidates(call) if reason is None]
    assert able
    for backend in able:
        poison()
        out = backend.prepare(None, None)(g_AO, given["x"], given["offsets"], None, given["gather"])
        torch.testing.assert_close(out, wanted)


def test_gradients_of_biases_are_summed_in_float32():
    g, offsets = torch.randn(3000, 5).add(1).bfloat16(), torch.tensor([0, 2000, 2000, 3000])
    wanted = torch.stack([g[:2000].double().sum(0), torch.zeros(5, dtype=torch.float64), g[2000:].double().sum(0)])
    torch.testing.assert_close(grouped.bias_gradient(g, offsets), wanted.bfloat16())


def test_gradients_are_not_wanted_in_inference_and_values_are_the_same():
    given, expert_A = case(COUNTS[0], 16, 16, True, True, False, dtype=torch.float32)
    plan = Plan.pairs(given["scatter"], expert_A, given["scale"], 6, 5)
    weight = given["weight"].requires_grad_()
    y = grouped_linear(given["x"], weight, plan, gather=True, scatter=True)
    assert y.requires_grad
    with torch.no_grad():
        again = grouped_linear(given["x"], weight, plan, gather=True, scatter=True)
    assert not again.requires_grad
    torch.testing.assert_close(y.detach(), again)
    with pytest.raises(PumiceError, match="the plan 5"):
        grouped_linear(given["x"], weight[:3], plan, gather=True, scatter=True)
    with pytest.raises(PumiceError, match="bfloat16"):
        grouped_linear(given["x"].bfloat16(), weight, plan, gather=True, scatter=True)


def test_torchs_backend_says_why_it_refuses():
    reasons = {}
    for dtype, rows, shape in ((torch.float64, 4, (16, 16)), (torch.float32, 4, (7, 16)), (torch.float32, 0, (16, 16))):
        call = Call("grouped_linear", "dense", dtype, "cpu", rows, shape, {"experts": 2})
        reasons[dtype, rows] = {backend.name: reason for backend, reason in dispatch.candidates(call)}
        assert dispatch.choose(call).name != "torch"
    assert "float64" in reasons[torch.float64, 4]["torch"]
    assert "multiples of 4" in reasons[torch.float32, 4]["torch"]
    assert "empty" in reasons[torch.float32, 0]["torch"]
