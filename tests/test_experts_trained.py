"""The perceptron of every expert with gradients: the operator, a few experts at a time, traced and under autocast."""

import pytest
import torch

from pumice.core import dispatch
from pumice.kernels import experts_trained, reference
from pumice.moe import Plan
from pumice.moe.grouped import expert_mlp
from tests.test_hidden import FORMS, NAMES, layer

pytestmark = pytest.mark.usefixtures("poisoned")


def experts(form, in_order=False, biased=True, dtype=torch.float64):
    """Arguments of `expert_mlp_trained`: three experts, of which one has no assignment."""
    torch.manual_seed(0)
    tokens, width, hidden = 5, 4, 3
    assignments = tokens if in_order else 8
    rows = hidden * (1 if form[1] == "none" else 2)
    offsets = torch.tensor([0, 3, 3, assignments])
    token = None if in_order else torch.randint(tokens, (assignments,))
    leaves = [torch.randn(tokens, width), torch.randn(3, rows, width), torch.randn(3, width, hidden)]
    leaves += [torch.randn(3, rows), torch.randn(3, width)] if biased else [None, None]
    scale = None if in_order else torch.rand(assignments).to(dtype)
    return *(None if leaf is None else leaf.to(dtype) for leaf in leaves), offsets, token, scale, *form


@pytest.mark.parametrize("form", FORMS[1::3] + FORMS[-2:], ids=lambda form: NAMES(form[:2]))
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
def test_gradients_of_the_operator(form, in_order, biased):
    args = experts(form, in_order, biased)
    places = [at for at, value in enumerate(args[:8]) if value is not None and value.is_floating_point()]

    def run(*values):
        full = list(args)
        for at, value in zip(places, values, strict=True):
            full[at] = value
        return torch.ops.pumice.expert_mlp_trained(*full)[0]

    def wanted(*values):
        full = list(args)
        for at, value in zip(places, values, strict=True):
            full[at] = value
        x, up, down, up_bias, down_bias, offsets, token, scale, *_ = full
        return reference.expert_mlp(x, up, down, offsets, token, scale, up_bias, down_bias, form)

    torch.testing.assert_close(run(*(args[at] for at in places)), wanted(*(args[at] for at in places)))
    for kept in [None, *range(len(places))]:
        leaves = [args[place].clone().requires_grad_(kept in (None, at)) for at, place in enumerate(places)]
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        g = torch.randn(5, 4, dtype=torch.float64)
        ours, theirs = torch.autograd.grad(run(*leaves), needed, g), torch.autograd.grad(wanted(*leaves), needed, g)
        for mine, theirs_too in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, theirs_too)


def test_the_operator_is_one_that_torch_can_trace():
    args = experts(FORMS[1], dtype=torch.float32)
    leaves = [value.requires_grad_() if at in (0, 1, 2, 7) else value for at, value in enumerate(args)]
    torch.library.opcheck(torch.ops.pumice.expert_mlp_trained.default, tuple(leaves))
    products, gradient, scale_A = layer(6, 4, FORMS[1], torch.float32)
    torch.library.opcheck(torch.ops.pumice.activate.default, (products, *FORMS[1]))
    for scale in (scale_A, None):
        torch.library.opcheck(torch.ops.pumice.activate_backward.default, (products, gradient, scale, *FORMS[1]))


def trained(run, leaves):
    for leaf in leaves:
        leaf.grad = None
    run().square().sum().backward()
    return [leaf.grad.clone() for leaf in leaves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_that_of_a_plan_with_a_tap(dtype):
    # A tap needs the products, so it takes the way of two operators.
    torch.manual_seed(0)
    x, up, down = (
        torch.randn(12, 16).to(dtype),
        torch.randn(4, 48, 16).to(dtype) * 0.2,
        torch.randn(4, 16, 24).to(dtype) * 0.2,
    )
    weight, index = torch.rand(12, 4).softmax(1).topk(2)
    leaves = [x, up, down, weight]
    for leaf in leaves:
        leaf.requires_grad_()
    fused = trained(lambda: expert_mlp(x, up, down, Plan.top_k(index, weight, 4)).float(), leaves)

    def tapped():
        plan = Plan.top_k(index, weight, 4)
        plan.tap = lambda both: both
        return expert_mlp(x, up, down, plan).float()

    slack = 1e-5 if dtype is torch.float32 else 3e-2
    for ours, theirs in zip(fused, trained(tapped, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=slack, atol=slack * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_order", [False, True])
def test_a_few_experts_at_a_time_are_all_of_them(isa, in_order, dtype):
    torch.manual_seed(0)
    assignments, width, hidden, tokens = 1300, 24, 40, 1300 if in_order else 90
    offsets = torch.tensor([0, 500, 510, 510, 1000, 1300])
    assert len(experts_trained._chunks(offsets)) == 3
    token = None if in_order else torch.randint(tokens, (assignments,))
    scale = None if in_order else torch.rand(assignments)
    x, g = torch.randn(tokens, width).to(dtype), torch.randn(tokens, width).to(dtype)
    up, down = (torch.randn(5, 2 * hidden, width) * 0.2).to(dtype), (torch.randn(5, width, hidden) * 0.2).to(dtype)
    biases = torch.randn(5, 2 * hidden).to(dtype), torch.randn(5, width).to(dtype)
    want, found = experts_trained.Want(True, True, True, True), {}
    routed = experts_trained.Routed(offsets, token, scale)
    for name in ("native", "parts"):
        state = up, down, FORMS[1]
        run = dispatch.get("expert_mlp_trained", "dense", name).prepare(state, None)
        y, products = run(x, routed, biases)
        back = dispatch.get("expert_mlp_backward", "dense", name).prepare(state, None)
        made = back(g, x, found.get("products", products), routed, want)
        found["products"] = products
        found[name] = [y, products, made.x, made.up, made.down, made.up_bias, made.scale]
    slack = 1e-4 if dtype is torch.float32 else 3e-2
    for ours, theirs in zip(found["native"], found["parts"], strict=True):
        if theirs is None or theirs.numel() == 0:
            assert in_order
            continue
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=slack, atol=slack * theirs.abs().max().item())


def test_only_the_products_are_kept_of_the_hidden_layer():
    torch.manual_seed(0)
    x, up, down = torch.randn(12, 16), torch.randn(4, 48, 16, requires_grad=True), torch.randn(4, 16, 24)
    weight, index = torch.rand(12, 4).softmax(1).topk(2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        expert_mlp(x, up, down, Plan.top_k(index, weight, 4))
    assert (24, 48) in kept
    assert (24, 24) not in kept


def test_training_compiles_and_autocast_agrees():
    torch.manual_seed(0)
    x, up, down = torch.randn(12, 16), torch.randn(4, 48, 16) * 0.2, torch.randn(4, 16, 24) * 0.2
    weight, index = torch.rand(12, 4).softmax(1).topk(2)
    leaves = [x, up, down, weight]
    for leaf in leaves:
        leaf.requires_grad_()
    plain = trained(lambda: expert_mlp(x, up, down, Plan.top_k(index, weight, 4)), leaves)
    plan = Plan.top_k(index, weight.detach(), 4)
    run = torch.compile(lambda: expert_mlp(x, up, down, plan), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(trained(run, leaves[:3]), plain, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    def half():
        with torch.autocast("cpu", torch.bfloat16):
            y = expert_mlp(x, up, down, Plan.top_k(index, weight, 4))
        assert y.dtype is torch.bfloat16
        return y.float()

    for ours, theirs in zip(trained(half, leaves), plain, strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())
