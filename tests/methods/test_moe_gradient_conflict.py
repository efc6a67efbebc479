"""STGC: the gradient that joins the backward pass is that of the loss on the tokens that conflict, and no other."""

import pytest
import torch
import torch.nn.functional as F

from pumice.moe import RouteContext
from pumice.moe.balance.gradient_conflict import conflicting
from tests.methods.moe_parts import D, draw, layer, tokens


def make(weight, kind="swiglu", **given):
    return layer(kind=kind, balance=[{"name": "gradient_conflict", "weight": weight}] if weight else {}, **given)


def test_conflicts_by_hand():
    gradient = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-0.5, 0.0], [0.0, 1.0], [0.0, 0.0]])
    expert = torch.tensor([0, 0, 0, 1, 1])
    assert conflicting(gradient, expert, 2, 0.0).tolist() == [False, False, True, False, False]
    assert conflicting(gradient, expert, 2, 0.999).tolist() == [True, False, True, False, False]


def explicit(moe, x, target):
    """The loss in two passes: token gradients first, then cross-entropy on the inverted logits."""
    seen = []

    def watch(hidden):
        hidden.retain_grad()
        seen.append(hidden)
        return hidden

    plan = moe.route(x, context_of(moe, x))
    plan.tap = watch
    (moe.run(x, plan) - target).square().sum().backward(retain_graph=True)
    wrong = conflicting(seen[0].grad, plan.expert_A, plan.experts, 0.0)
    moe.zero_grad()
    logits = plan.routing.logits_TE
    return F.cross_entropy(-logits[plan.token_A[wrong]], plan.expert_A[wrong]), wrong


def context_of(moe, x):
    return RouteContext().for_layer(x.shape, moe.experts, True, x.device)


@pytest.mark.parametrize("kind", ["swiglu", "mlp", "neurons"])
def test_equals_the_loss_in_two_passes(kind):
    x, target = tokens(), draw(40, D, seed=5)
    plain = make(0.0, kind)
    loss, wrong = explicit(plain, x, target)
    assert 0 < wrong.sum() < len(wrong)
    (wanted,) = torch.autograd.grad(loss, plain.router.weight_ED)

    def gradient(weight, factor):
        moe = make(weight, kind)
        y = moe(x)
        (factor * ((y - target).square().sum() + moe.aux_loss)).backward()
        if weight:
            assert float(moe.balance[0].conflicts) == pytest.approx(float(wrong.float().mean()))
        return moe.router.weight_ED.grad

    for factor in (1.0, 8.0):
        extra = gradient(0.5, factor) - gradient(0.0, factor)
        torch.testing.assert_close(extra, 0.5 * factor * wanted, rtol=1e-3, atol=1e-5 * factor)


def test_a_step_lowers_the_probability_of_the_present_expert():
    x, target = tokens(), draw(40, D, seed=5)
    _, wrong = explicit(make(0.0), x, target)
    moe = make(1.0)
    (moe(x) - target).square().sum().mul(0).add(moe.aux_loss).backward()
    assert moe.router.weight_ED.grad is None or not moe.router.weight_ED.grad.any(), "no gradient, no conflict"
    moe = make(1.0)
    y = moe(x)
    plan = moe.plan
    wrong_token, wrong_expert = plan.token_A[wrong], plan.expert_A[wrong]
    ((y - target).square().sum() + moe.aux_loss).backward()
    extra = moe.router.weight_ED.grad
    before = plan.routing.probability_TE[wrong_token, wrong_expert].mean()
    plain = make(0.0)
    (plain(x) - target).square().sum().backward()
    with torch.no_grad():
        moe.router.weight_ED -= 0.1 * (extra - plain.router.weight_ED.grad)
        after = moe.router(x, context_of(moe, x)).probability_TE[wrong_token, wrong_expert].mean()
    assert after < before


def test_nothing_without_gradients_and_nothing_for_soft_plans():
    moe = make(1.0)
    with torch.no_grad():
        moe(tokens())
    assert moe.aux_loss == 0
    soft = make(1.0, assign="soft")
    y = soft(tokens(12).view(2, 6, D))
    (y.sum() + soft.aux_loss).backward()
    assert soft.aux_loss == 0
