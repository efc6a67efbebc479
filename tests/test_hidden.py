"""The hidden layer of experts in training: slopes of activations, and the kernels on every set of instructions."""

import itertools

import pytest
import torch

from pumice.core import dispatch
from pumice.core.activation import ACTIVATIONS, SLOPES, activate, activate_backward
from pumice.core.dispatch import Call

FORMS = [(act, gate, 0.0, 0.0) for act in ACTIVATIONS for gate in ("none", "halves", "pairs")]
FORMS += [("clamped_swish", "halves", 1.702, 1.0), ("clamped_swish", "pairs", 1.5, 0.5)]
NAMES = "-".join
pytestmark = pytest.mark.usefixtures("poisoned")


def by_autograd(products, gradient, scale_A, form):
    """What `activate_backward` returns, in float64."""
    p = products.double().requires_grad_()
    scale = torch.ones(len(p), dtype=torch.float64) if scale_A is None else scale_A.double()
    scale.requires_grad_()
    hidden = activate(p, *form) * scale[:, None]
    to_products, to_scale = torch.autograd.grad(hidden, (p, scale), gradient.double())
    return hidden.detach(), to_products, None if scale_A is None else to_scale


def layer(rows, width, form, dtype):
    torch.manual_seed(0)
    products = torch.randn(rows, width * (1 if form[1] == "none" else 2)) * 2
    if products.numel() > 2:
        products.view(-1)[:3] = torch.tensor([0.0, -60.0, 60.0])
    return products.to(dtype), torch.randn(rows, width).to(dtype), torch.rand(rows)


def test_every_activation_has_its_derivative():
    assert SLOPES.keys() == ACTIVATIONS.keys()
    x = torch.randn(500, dtype=torch.float64) * 3
    for act, function in ACTIVATIONS.items():
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(SLOPES[act](x), torch.autograd.grad(function(leaf).sum(), leaf)[0])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: NAMES(form[:2]))
@pytest.mark.parametrize("scaled", [False, True])
def test_the_specification_is_the_derivative(form, scaled):
    products, gradient, scale_A = layer(9, 7, form, torch.float64)
    scale_A = scale_A.double() if scaled else None
    for ours, theirs in zip(
        activate_backward(products, gradient, scale_A, *form),
        by_autograd(products, gradient, scale_A, form),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: NAMES(form[:2]))
def test_the_kernels_are_as_exact_as_the_specification(isa, form, dtype):
    for (rows, width), scaled in itertools.product(
        ((1, 1), (5, 33), (0, 8), (7, 1), (3, 1100), (64, 512)), (False, True)
    ):
        products, gradient, scale_A = layer(rows, width, form, dtype)
        scale_A = scale_A if scaled else None
        found = {}
        for op, args in (("activate", ()), ("activate_backward", (gradient, scale_A))):
            call = Call(op, "dense", dtype, "cpu", rows, (width, products.shape[1]))
            for backend, reason in dispatch.candidates(call):
                assert reason is None
                given = [None if arg is None else arg.clone() for arg in args]
                made = backend.prepare(form, None)(products, *given)
                found[op, backend.name] = (given[0], *made) if args else (made,)
        exact = by_autograd(products, gradient, scale_A, form)
        plain = activate(products.double(), *form)
        for op, truth in (("activate", (plain,)), ("activate_backward", exact)):
            for ours, theirs, true in zip(found[op, "native"], found[op, "torch"], truth, strict=True):
                if true is None:
                    assert ours is None
                    continue
                assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
                if not rows:
                    continue
                assert torch.isfinite(ours).all()
                most = 2 * (theirs.double() - true).abs().max() + 2e-6 * true.abs().max().clamp(min=1)
                assert (ours.double() - true).abs().max() <= most


def test_far_from_zero_and_nan(isa):
    x = torch.tensor([[float("nan")], [3e4], [-1e4], [-90.0], [-20.0], [0.0], [20.0], [1e4]])
    for act in ACTIVATIONS:
        form = (act, "none", 0.0, 0.0)
        run = dispatch.get("activate_backward", "dense", "native").prepare(form, None)
        hidden, theirs = torch.ones_like(x), by_autograd(x, torch.ones_like(x), None, form)
        to_products, _ = run(x, hidden, None)
        assert hidden[0].isnan()
        assert to_products[0].isnan()
        for mine, true in zip((hidden, to_products), theirs[:2], strict=True):
            torch.testing.assert_close(mine[1:].double(), true[1:], rtol=1e-5, atol=2e-6)


def test_rows_that_lie_apart_and_threads(isa):
    products, gradient, scale_A = layer(40, 24, FORMS[1], torch.float32)
    wide = torch.full((40, 100), torch.nan)
    wide[:, :48] = products
    run, before, results = dispatch.get("activate_backward", "dense", "native").prepare(FORMS[1], None), 1, []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        hidden = torch.full((40, 60), torch.nan)[:, :24].copy_(gradient)
        results.append((hidden, *run(wide[:, :48], hidden, scale_A)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
