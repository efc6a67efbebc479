"""Adaptive gating: one expert where the lead exceeds the margin, else two."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext, Routing
from pumice.moe.assign.adaptive import adaptive, difficulty
from pumice.moe.assign.token_choice import token_choice

E = 5


def routing_of(tokens, **more):
    logits = torch.randn(tokens, E, generator=torch.Generator().manual_seed(0))
    return Routing(logits, logits.softmax(1), **more)


@pytest.mark.parametrize("margin", [0.05, 0.1, 0.3])
def test_the_lead_decides(margin):
    routing = routing_of(200)
    plan = adaptive(routing, RouteContext(), margin=margin)
    value, index = routing.weight_TE.topk(2, dim=1)
    count = torch.bincount(plan.token_A, minlength=200)
    assert torch.equal(count == 1, value[:, 0] - value[:, 1] > margin)
    assert set(count.tolist()) == {1, 2}
    combine = plan.combine_TE
    torch.testing.assert_close(combine.gather(1, index[:, :1])[:, 0], value[:, 0])
    torch.testing.assert_close(combine.gather(1, index[:, 1:])[:, 0], value[:, 1] * (count == 2))


@pytest.mark.parametrize(("margin", "top_k"), [(0.0, 1), (1.0, 2)])
def test_the_ends_are_top_1_and_top_2(margin, top_k):
    routing = routing_of(50)
    ours, theirs = adaptive(routing, RouteContext(), margin=margin), token_choice(routing, RouteContext(), top_k=top_k)
    torch.testing.assert_close(ours.combine_TE, theirs.combine_TE)


def test_difficulty_is_the_share_of_tokens_with_two_experts():
    torch.manual_seed(0)
    layer = MoE(8, 4, E, {"name": "linear", "scale": 4.0}, "adaptive", shared=0)
    x = torch.randn(3, 10, 8)
    context = RouteContext().for_layer(x.shape, layer.experts, False, x.device)
    layer(x)
    two = torch.bincount(layer.plan.token_A, minlength=30).view(3, 10) == 2
    assert 0 < int(two.sum()) < 30
    torch.testing.assert_close(difficulty(layer.plan, context), two.float().mean(1))
    with pytest.raises(PumiceError, match="segment_T"):
        difficulty(layer.plan, RouteContext())


def test_one_expert_and_forbidden_ones():
    logits = torch.zeros(4, 1)
    assert adaptive(Routing(logits, logits.softmax(1)), RouteContext()).load_E.tolist() == [4]
    allowed = torch.ones(3, E, dtype=torch.bool)
    allowed[0], allowed[1, 1:] = False, False
    plan = adaptive(routing_of(3, allowed_TE=allowed), RouteContext(), margin=1.0)
    assert torch.bincount(plan.token_A, minlength=3).tolist() == [0, 1, 2]


def test_what_cannot_be_is_refused():
    with pytest.raises(PumiceError, match="margin=2"):
        adaptive(routing_of(2), RouteContext(), margin=2.0)
