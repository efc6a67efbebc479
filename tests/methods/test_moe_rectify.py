"""Rectify-Router: no token is lost, none leaves its device for want of room, and slots are filled by score."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import RouteContext, Routing
from pumice.moe.assign.rectify import rectify
from pumice.moe.assign.token_choice import token_choice

T, E = 48, 6


def routing_of(skew=2.0, **more):
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += skew
    return Routing(logits, logits.softmax(1), **more)


def by_hand(routing, top_k, capacity, devices, stay, fill):
    """The two steps in plain Python."""
    room = -int(-capacity * T * top_k // E)
    score = routing.weight_TE
    wanted = [score[t].argsort(descending=True)[:top_k].tolist() for t in range(T)]
    has = [set() for _ in range(T)]
    count, refused = [0] * E, [0] * T
    for choice in range(top_k):
        for t in range(T):
            e = wanted[t][choice]
            if count[e] < room:
                has[t].add(e)
                count[e] += 1
            else:
                refused[t] += 1
    if stay:
        for t in range(T):
            home = t * devices // T
            near = [e for e in range(E) if e // (E // devices) == home and e not in has[t]]
            for e in sorted(near, key=lambda e: -float(score[t, e]))[: refused[t]]:
                has[t].add(e)
                count[e] += 1
    if fill:
        for e in range(E):
            others = [t for t in range(T) if e not in has[t]]
            for t in sorted(others, key=lambda t: -float(score[t, e]))[: max(0, room - count[e])]:
                has[t].add(e)
    return torch.tensor([[e in has[t] for e in range(E)] for t in range(T)])


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize(("stay", "fill"), [(True, True), (True, False), (False, True), (False, False)])
def test_it_is_the_two_steps_done_by_hand(top_k, devices, stay, fill):
    routing = routing_of()
    options = {"top_k": top_k, "capacity": 1.0, "devices": devices, "stay": stay, "fill": fill}
    plan = rectify(routing, RouteContext(), **options)
    mask = plan.combine_TE > 0
    assert torch.equal(mask, by_hand(routing, **options))
    torch.testing.assert_close(plan.combine_TE, routing.weight_TE * mask)


def test_neither_waste_nor_loss():
    routing = routing_of()
    plain = token_choice(routing, RouteContext(), top_k=1, capacity=1.0)
    assert plain.dropped > 0
    assert int(plain.load_E.min()) < T // E
    plan = rectify(routing, RouteContext(), devices=3)
    assert plan.dropped == 0
    assert (torch.bincount(plan.token_A, minlength=T) >= 1).all()
    assert int(plan.load_E.min()) >= T // E
    # What was placed normally stays where it was.
    assert (plan.combine_TE > 0)[plain.combine_TE > 0].all()


def test_without_both_steps_it_is_token_choice_with_its_losses():
    routing = routing_of(renormalise=False)
    plain = token_choice(routing, RouteContext(), top_k=2, capacity=1.0)
    plan = rectify(routing, RouteContext(), top_k=2, stay=False, fill=False)
    torch.testing.assert_close(plan.combine_TE, plain.combine_TE)
    assert plan.dropped == plain.dropped > 0
    assert torch.equal(plan.asked_E, plain.asked_E)


def test_forbidden_experts_stay_empty():
    allowed = torch.ones(T, E, dtype=torch.bool)
    allowed[:, 4] = False
    plan = rectify(routing_of(allowed_TE=allowed), RouteContext(), devices=2)
    assert plan.load_E[4] == 0


def test_what_cannot_be_is_refused():
    with pytest.raises(PumiceError, match="devices=4 with 6 experts"):
        rectify(routing_of(), RouteContext(), devices=4)
    with pytest.raises(PumiceError, match="capacity=0"):
        rectify(routing_of(), RouteContext(), capacity=0.0)
