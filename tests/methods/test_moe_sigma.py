"""σ-MoE: weights that do not compete, entropy of the batch, expert dropout, the dense layer's initialisation."""

import math

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import RouteContext, Routing
from tests.methods.moe_parts import E, assigned, balance, draw, layer, router, tokens, training


def test_an_experts_weight_does_not_depend_on_the_others():
    made = router("sigma")
    before = made(tokens(), RouteContext()).weight_TE.clone()
    with torch.no_grad():
        made.weight_ED[3] += 1.0
    after = made(tokens(), RouteContext()).weight_TE
    others = [e for e in range(E) if e != 3]
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before[:, 3], after[:, 3])


def test_all_experts_with_weight_one_are_the_dense_layer():
    moe, x = layer("sigma", kind="sigma", top_k=E), tokens()
    with torch.no_grad():
        moe.router.weight_ED.zero_()
    up, down = moe.experts.up_proj.flatten(0, 1), moe.experts.down_proj.transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(2 * moe(x), (x @ up.t()).relu() @ down.t())


def test_initialisation_is_of_the_dense_layer():
    moe = layer("sigma", kind="sigma", d_model=64, d_ff=32)
    assert moe.experts.up_proj.std().item() == pytest.approx(64**-0.5, rel=0.03)
    assert moe.experts.down_proj.std().item() == pytest.approx((8 * 32) ** -0.5, rel=0.03)
    torch.testing.assert_close(moe.router.weight_ED.norm(dim=1), torch.ones(8))


def test_dropout_leaves_experts_out_in_training_only():
    made = router("sigma", dropout=0.3)
    assert made(tokens(), RouteContext()).allowed_TE is None
    routing = made(tokens(2000), training())
    assert (~routing.allowed_TE).float().mean().item() == pytest.approx(0.3, abs=0.02)
    plan = assigned("token_choice", routing, top_k=2)
    assert routing.allowed_TE[plan.token_A, plan.expert_A].all()
    torch.testing.assert_close(plan.weight_A, routing.weight_TE[plan.token_A, plan.expert_A])
    with pytest.raises(PumiceError, match="dropout=1"):
        router("sigma", dropout=1.0)


def plan_of(logits):
    return assigned("token_choice", Routing(logits, logits.sigmoid()))


def test_batch_entropy():
    logits = draw(40, E)
    mean = logits.softmax(1).mean(0)
    torch.testing.assert_close(balance("batch_entropy", plan_of(logits)), (mean * mean.log()).sum())
    firm_but_even = 50 * torch.eye(E).repeat(5, 1)
    torch.testing.assert_close(balance("batch_entropy", plan_of(firm_but_even)), torch.tensor(-math.log(E)))
    alike = torch.tensor([[50.0] + [0.0] * (E - 1)]).repeat(40, 1)
    assert abs(float(balance("batch_entropy", plan_of(alike)))) < 1e-5
