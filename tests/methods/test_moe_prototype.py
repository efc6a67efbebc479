"""Expert prototyping: k independent top-1 routers over k groups."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext, Routing
from pumice.moe.assign.prototype import prototype

D, E = 8, 12


def routing_of(logits, **more):
    return Routing(logits, logits.softmax(1), **more)


@pytest.mark.parametrize("groups", [1, 2, 3, 12])
def test_it_is_one_top_1_router_with_a_softmax_in_each_group(groups):
    logits = torch.randn(30, E, generator=torch.Generator().manual_seed(0))
    plan = prototype(routing_of(logits), RouteContext(), top_k=groups)
    expected = torch.zeros(30, E)
    for group in range(groups):
        here = slice(group * E // groups, (group + 1) * E // groups)
        share, best = logits[:, here].softmax(1).max(1)
        expected[torch.arange(30), best + here.start] = share
    torch.testing.assert_close(plan.combine_TE, expected)
    assert (torch.bincount(plan.token_A) == groups).all()


def test_the_layer_sums_the_groups_and_every_group_learns():
    torch.manual_seed(0)
    layer = MoE(D, 4, E, "linear", "prototype", top_k=3, shared=0)
    layer(torch.randn(40, D)).square().sum().backward()
    reached = layer.router.weight_ED.grad.abs().sum(1).view(3, 4)
    assert (reached.sum(1) > 0).all()


def test_each_expert_takes_its_share_of_the_capacity():
    logits = torch.randn(40, E, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += 100
    plan = prototype(routing_of(logits), RouteContext(), top_k=3, capacity=1.0)
    assert int(plan.load_E.max()) <= 10
    assert plan.load_E[0] == 10
    assert plan.dropped >= 30
    kept = plan.token_A[plan.expert_A == 0]
    assert kept.tolist() == list(range(10)), "earlier tokens first"


def test_a_group_without_allowed_experts_sends_nothing():
    allowed = torch.ones(5, E, dtype=torch.bool)
    allowed[2, :4] = False
    allowed[3, :3] = False
    plan = prototype(routing_of(torch.randn(5, E), allowed_TE=allowed), RouteContext(), top_k=3)
    assert torch.bincount(plan.token_A).tolist() == [3, 3, 2, 3, 3]
    assert float(plan.combine_TE[3, 3]) == pytest.approx(1), "the only one of its group"


def test_unequal_groups_are_refused():
    with pytest.raises(PumiceError, match="top_k=5 with 12 experts"):
        prototype(routing_of(torch.randn(2, E)), RouteContext(), top_k=5)
    with pytest.raises(PumiceError, match="order='size'"):
        prototype(routing_of(torch.randn(2, E)), RouteContext(), order="size")
