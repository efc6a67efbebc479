"""The C++ stages of grouped products and the op "expert_mlp", on every set of instructions that this machine has."""

import itertools

import pytest
import torch

from pumice.core import dispatch
from pumice.core.activation import ACTIVATIONS
from pumice.core.dispatch import Call
from pumice.core.errors import PumiceError
from pumice.kernels import cpu_backend, grouped_cpu, reference
from pumice.kernels.experts import expert_mlp

SETS = [name for name, why in cpu_backend.instruction_sets().items() if why is None]
# Tokens, assignments, experts, outputs, inputs: one of each; empty experts; tails of every tile; many rows; many inputs; whole
# registers of inputs over more than one stretch; rows of w that meet in the same set of a cache; an odd width with many rows.
SIZES = [(1, 1, 1, 1, 1), (5, 9, 3, 40, 33), (7, 0, 2, 5, 6), (40, 64, 3, 336, 130), (150, 420, 3, 70, 1100)]
SIZES += [(40, 70, 2, 45, 1184), (30, 40, 1, 24, 2048), (60, 270, 1, 81, 67)]
pytestmark = pytest.mark.skipif(not SETS, reason="the C++ kernels were not built")


@pytest.fixture(params=SETS)
def instructions(request):
    cpu_backend.force(request.param)
    yield request.param
    cpu_backend.force(None)


def plan(tokens, assignments, experts):
    expert_A = torch.randint(experts, (assignments,)).sort().values
    offsets_E1 = torch.searchsorted(expert_A, torch.arange(experts + 1))
    return torch.randint(tokens, (assignments,)), offsets_E1, torch.rand(assignments)


def no_worse(ours, theirs, truth, dtype):
    if truth.numel() == 0:
        assert ours.shape == truth.shape
        return
    least = 1e-6 if dtype == torch.float32 else 1e-3
    assert torch.isfinite(ours).all()
    assert (ours.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_grouped_linear_is_as_exact_as_the_reference(instructions, size, dtype):
    tokens, assignments, experts, outputs, inputs = size
    torch.manual_seed(0)
    x = torch.randn(tokens, inputs).to(dtype)
    token_A, offsets_E1, scale_A = plan(tokens, assignments, experts)
    bias_EO = torch.randn(experts, outputs).to(dtype)
    for transposed, bias, scatter in itertools.product((False, True), (None, bias_EO), (False, True)):
        shape = (experts, inputs, outputs) if transposed else (experts, outputs, inputs)
        weight = (torch.randn(shape) * inputs**-0.5).to(dtype)
        weight = weight.transpose(1, 2) if transposed else weight
        more = (token_A, token_A if scatter else None, scale_A, tokens if scatter else 0)
        wide = (x.double(), weight.double(), offsets_E1, None if bias is None else bias.double())
        truth = reference.grouped_linear(*wide, token_A, more[1], scale_A.double(), more[3])
        theirs = reference.grouped_linear(x, weight, offsets_E1, bias, *more)
        ours = grouped_cpu.stage(x, weight, offsets_E1, bias, grouped_cpu.PLAIN, *more)
        no_worse(ours, theirs, truth, dtype)


# Assignments, experts, outputs, inputs: one of each; none; an empty expert; more than a piece of outputs, than a stretch of
# assignments, and than the inputs that are summed up at a time.
OUTER = [(1, 1, 1, 1), (0, 2, 5, 6), (9, 4, 33, 7), (40, 3, 300, 70), (600, 1, 20, 40), (30, 2, 8, 600)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", OUTER, ids=str)
def test_grouped_outer_is_as_exact_as_the_reference(instructions, size, dtype):
    assignments, experts, outputs, inputs = size
    torch.manual_seed(0)
    rows_A, offsets_E1, _ = plan(7, assignments, experts)
    for g_rows, x_rows, apart in itertools.product((None, rows_A), (None, rows_A), (False, True)):
        g = torch.randn(assignments if g_rows is None else 7, outputs + 3 * apart)[:, :outputs].to(dtype)
        x = torch.randn(assignments if x_rows is None else 7, inputs + 5 * apart)[:, :inputs].to(dtype)
        truth = reference.grouped_outer(g.double(), x.double(), offsets_E1, g_rows, x_rows)
        theirs = reference.grouped_outer(g, x, offsets_E1, g_rows, x_rows)
        out = torch.full((experts, outputs, inputs), torch.nan, dtype=dtype)
        ours = grouped_cpu.outer(g, x, offsets_E1, g_rows, x_rows, out)
        assert ours is out
        no_worse(ours, theirs, truth, dtype)
        assert torch.equal(grouped_cpu.outer(g, x, offsets_E1, g_rows, x_rows), out)


def test_an_outer_plan_that_points_outside_is_refused():
    g, x = torch.randn(3, 4), torch.randn(3, 5)
    for g_rows, x_rows, offsets in (([0, 3], None, [0, 2]), (None, [0, 1, -1], [0, 3]), (None, None, [0, 4])):
        rows = [None if rows is None else torch.tensor(rows) for rows in (g_rows, x_rows)]
        with pytest.raises(PumiceError, match="does not fit"):
            grouped_cpu.outer(g, x, torch.tensor(offsets), *rows)


FORMS = [(act, gate, 0.0, 0.0) for act in ACTIVATIONS for gate in ("halves", "none")]
FORMS += [("silu", "pairs", 0.0, 0.0), ("clamped_swish", "pairs", 1.702, 2.0), ("clamped_swish", "halves", 1.5, 0.5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0]}-{form[1]}")
def test_expert_mlp_is_as_exact_as_the_reference(instructions, form, dtype):
    torch.manual_seed(0)
    tokens, experts, width, hidden = 70, 3, 34, 150
    token_A, offsets_E1, scale_A = plan(tokens, 330, experts)
    rows = hidden if form[1] == "none" else 2 * hidden
    x = torch.randn(tokens, width).to(dtype)
    up, down = (torch.randn(experts, rows, width) * 0.5).to(dtype), torch.randn(experts, width, hidden).to(dtype) * 0.1
    biases = torch.randn(experts, rows).to(dtype), torch.randn(experts, width).to(dtype)
    wide = [tensor.double() for tensor in (x, up, down)]
    more = (offsets_E1, token_A)
    truth = reference.expert_mlp(*wide, *more, scale_A.double(), *(b.double() for b in biases), form)
    theirs = reference.expert_mlp(x, up, down, *more, scale_A, *biases, form)
    call = Call("expert_mlp", "dense", dtype, "cpu", 330, (hidden, width), {"experts": experts})
    for backend, reason in dispatch.candidates(call):
        assert reason is None
        no_worse(backend.prepare((up, down, form), None)(x, *more, scale_A, *biases), theirs, truth, dtype)


def test_activations_hold_far_from_zero_and_keep_nan(instructions):
    x = torch.tensor([[float("nan")], [3e4], [-1e4], [-90.0], [-20.0], [0.0], [20.0], [1e4]])
    offsets = torch.tensor([0, 8])
    for act, function in ACTIVATIONS.items():
        finish = grouped_cpu.Finish(grouped_cpu.ACTIVATE, grouped_cpu.ACTIVATIONS.index(act))
        ours = grouped_cpu.stage(x, torch.ones(1, 1, 1), offsets, None, finish)
        torch.testing.assert_close(ours, function(x), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_the_result_does_not_depend_on_threads(instructions):
    torch.manual_seed(0)
    token_A, offsets_E1, scale_A = plan(30, 60, 4)
    x, up, down = torch.randn(30, 40), torch.randn(4, 128, 40), torch.randn(4, 40, 64)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            args = (x, up, down, None, None, offsets_E1, token_A, scale_A, "silu", "halves", 0.0, 0.0)
            results.append(expert_mlp(*args))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_plan_that_points_outside_is_refused():
    x, weight = torch.randn(3, 4), torch.randn(2, 5, 4)
    for gather, offsets in (([0, 3], [0, 1, 2]), ([0, -1], [0, 1, 2]), ([0, 1], [0, 2, 1]), ([0, 1], [0, 1, 3])):
        with pytest.raises(PumiceError, match="does not fit"):
            grouped_cpu.stage(
                x, weight, torch.tensor(offsets), None, grouped_cpu.PLAIN, torch.tensor(gather), None, None, 0
            )


def test_gradients_are_those_of_the_loop_and_repeat():
    torch.manual_seed(0)
    token_A, offsets_E1, scale_A = plan(12, 24, 3)
    given = torch.randn(12, 16), torch.randn(3, 20, 16), torch.randn(3, 20), scale_A

    def gradients():
        x, weight, bias, scale = (tensor.clone().requires_grad_() for tensor in given)
        args = (x, weight, offsets_E1, bias, token_A, token_A, scale, 12)
        torch.ops.pumice.grouped_linear(*args).square().sum().backward()
        return [tensor.grad for tensor in (x, weight, bias, scale)]

    x, weight, bias, scale = (tensor.clone().requires_grad_() for tensor in given)
    reference.grouped_linear(x, weight, offsets_E1, bias, token_A, token_A, scale, 12).square().sum().backward()
    first, second = gradients(), gradients()
    for ours, again, theirs in zip(first, second, (x.grad, weight.grad, bias.grad, scale.grad), strict=True):
        assert torch.equal(ours, again)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_expert_mlp_compiles_to_one_graph():
    torch.manual_seed(0)
    token_A, offsets_E1, scale_A = plan(6, 12, 3)
    x, up, down = torch.randn(6, 16), torch.randn(3, 48, 16), torch.randn(3, 16, 24)

    def run(x):
        args = (up, down, None, None, offsets_E1, token_A, scale_A, "silu", "halves", 0.0, 0.0)
        return torch.ops.pumice.expert_mlp(x * 2, *args) + 1

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))
    args = (x, up, down, None, None, offsets_E1, token_A, scale_A, "silu", "halves", 0.0, 0.0)
    torch.library.opcheck(torch.ops.pumice.expert_mlp.default, args, test_utils=("test_schema", "test_faketensor"))


def test_large_groups_of_bf16_are_left_to_amx(monkeypatch):
    class WithAmx:
        @staticmethod
        def features():
            return ["amx_bf16"]

    monkeypatch.setattr(grouped_cpu, "native", WithAmx)
    for rows, dtype, refused in (
        (16, torch.bfloat16, False),
        (4096, torch.bfloat16, True),
        (4096, torch.float32, False),
    ):
        reason = grouped_cpu.refuse(Call("grouped_linear", "dense", dtype, "cpu", rows, (8, 8), {"experts": 8}))
        assert bool(reason and "AMX" in reason) == refused
