"""HMoE: experts of different size, and a loss that counts activated parameters."""

import pytest
import torch
import torch.nn.functional as F

from pumice.core.errors import PumiceError
from pumice.moe import RouteContext, Routing
from pumice.moe.experts.heterogeneous import progression
from tests.methods.moe_parts import E, assigned, balance, draw, layer, tokens


@pytest.mark.parametrize(
    ("mean", "count", "spread"), [(8, 8, 0.5), (100, 7, 0.9), (3, 4, 0.99), (5, 1, 0.5), (6, 3, 0.0)]
)
def test_sizes_are_a_progression_of_the_given_sum(mean, count, spread):
    sizes = progression(mean, count, spread)
    assert sum(sizes) == mean * count
    assert min(sizes) >= 1
    steps = torch.tensor(sizes).diff()
    assert (steps >= 0).all() or mean < 4
    if spread == 0:
        assert set(sizes) == {mean}


def make(**given):
    return layer(kind={"name": "heterogeneous", "spread": 0.5}, **given)


def test_equals_one_swiglu_of_each_size():
    moe, x = make(), tokens()
    y, ex = moe(x), moe.experts
    edges = [0, *torch.tensor(ex.sizes).cumsum(0).tolist()]
    by_hand = torch.zeros_like(x)
    for e in range(E):
        rows = slice(edges[e], edges[e + 1])
        hidden = F.silu(x @ ex.gate_proj[rows].t()) * (x @ ex.up_proj[rows].t())
        by_hand += moe.plan.combine_TE[:, e : e + 1] * (hidden @ ex.down_proj[rows])
    torch.testing.assert_close(y, by_hand)
    assert len(set(ex.sizes)) == E
    torch.testing.assert_close(ex.size_E.mean(), torch.tensor(1.0))


def plan_of(logits):
    return assigned("token_choice", Routing(logits, logits.softmax(1)), top_k=2)


def test_penalty_by_hand_and_its_limit_of_equal_sizes():
    logits = draw(40, E)
    plan, experts = plan_of(logits), make().experts
    size = torch.tensor(experts.sizes) / 8
    wanted = E * (plan.load_E / 40 * size * logits.softmax(1).mean(0)).sum()
    torch.testing.assert_close(balance("parameter_penalty", plan, RouteContext(experts=experts)), wanted)
    equal = balance("parameter_penalty", plan, RouteContext(experts=layer().experts))
    torch.testing.assert_close(equal, 2 * balance("load", plan))


def test_minimising_the_penalty_activates_smaller_experts():
    experts = make().experts
    logits = draw(200, E, seed=2).requires_grad_()

    def activated():
        plan = plan_of(logits.detach())
        return float((plan.load_E * experts.size_E).sum() / 400)

    before = activated()
    for _ in range(60):
        loss = balance("parameter_penalty", plan_of(logits), RouteContext(experts=experts))
        (step,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= 100 * step
    assert activated() < before - 0.05


def test_they_cannot_be_merged():
    with pytest.raises(PumiceError, match="differ in shape"):
        make(assign="merge")
    with pytest.raises(PumiceError, match="spread=1"):
        layer(kind={"name": "heterogeneous", "spread": 1.0})
