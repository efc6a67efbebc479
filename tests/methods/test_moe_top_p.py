"""Top-p routing (and XMoE): the smallest set of experts that reaches a probability."""

from itertools import combinations

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext, Routing
from pumice.moe.assign.top_p import smallest_prefix, top_p

D, E = 8, 6


def routing_of(tokens, sharp=1.0, **more):
    logits = sharp * torch.randn(tokens, E, generator=torch.Generator().manual_seed(0))
    return Routing(logits, logits.softmax(1), **more)


@pytest.mark.parametrize("p", [0.1, 0.4, 0.75, 0.9])
def test_no_smaller_set_reaches_p(p):
    routing = routing_of(40)
    mask = top_p(routing, RouteContext(), p=p).combine_TE > 0
    for row, chosen in zip(routing.weight_TE, mask, strict=True):
        assert float(row[chosen].sum()) >= p - 1e-6
        size = int(chosen.sum())
        smaller = [float(row[list(few)].sum()) for few in combinations(range(E), size - 1)]
        assert max(smaller, default=0.0) < p


def test_the_combine_weights_are_the_probabilities_themselves():
    routing = routing_of(40)
    plan = top_p(routing, RouteContext(), p=0.6)
    torch.testing.assert_close(plan.weight_A, routing.weight_TE[plan.token_A, plan.expert_A])
    scaled = Routing(routing.logits_TE, 7 * routing.weight_TE, renormalise=True)
    again = top_p(scaled, RouteContext(), p=0.6)
    assert torch.equal(again.token_A, plan.token_A)
    torch.testing.assert_close(again.combine_TE.sum(1), torch.ones(40))


def test_unsure_tokens_get_more_experts_and_all_is_reached_with_p_1():
    few = top_p(routing_of(200, sharp=5.0), RouteContext()).statistics()["per_token"]
    many = top_p(routing_of(200, sharp=0.1), RouteContext()).statistics()["per_token"]
    assert 1 <= few < 1.2
    assert many > 2
    assert top_p(routing_of(20), RouteContext(), p=1.0).statistics()["per_token"] > E - 0.5
    assert smallest_prefix(torch.tensor([[0.0, 1.0, 0.0]]), 0.5).tolist() == [[False, True, False]]


def test_a_capacity_keeps_the_largest_weights_or_the_first_tokens():
    routing = routing_of(60, sharp=0.5)
    free = top_p(routing, RouteContext(), p=0.9)
    room = -(-free.token_A.shape[0] // E)
    for order in ("priority", "position"):
        plan = top_p(routing, RouteContext(), p=0.9, capacity=1.0, order=order)
        assert int(plan.load_E.max()) <= room
        assert plan.dropped == free.token_A.shape[0] - plan.token_A.shape[0] > 0
        expert = int(free.load_E.argmax())
        all_of = free.expert_A == expert
        value = free.weight_A[all_of] if order == "priority" else -free.token_A[all_of].float()
        best = free.token_A[all_of][value.argsort(descending=True)[:room]].sort().values
        assert torch.equal(plan.token_A[plan.expert_A == expert], best)


def test_the_entropy_loss_makes_the_router_need_fewer_experts():
    torch.manual_seed(0)
    layer = MoE(D, 4, E, "linear", {"name": "top_p", "p": 0.6}, shared=0, balance={"entropy": 1.0})
    x, optimizer = torch.randn(64, D), torch.optim.Adam(layer.parameters(), lr=0.05)
    used = []
    for _ in range(40):
        layer(x)
        used.append(layer.plan.statistics()["per_token"])
        optimizer.zero_grad()
        layer.aux_loss.backward()
        optimizer.step()
    assert used[0] > 3
    assert used[-1] < 2


def test_forbidden_experts_are_not_counted():
    allowed = torch.rand(30, E, generator=torch.Generator().manual_seed(1)) > 0.5
    allowed[0] = False
    plan = top_p(routing_of(30, allowed_TE=allowed), RouteContext(), p=1.0)
    assert torch.equal(plan.combine_TE > 0, allowed)


def test_what_cannot_be_is_refused():
    for options in ({"p": 0.0}, {"p": 1.5}, {"order": "size"}):
        with pytest.raises(PumiceError, match=next(iter(options))):
            top_p(routing_of(2), RouteContext(), **options)
