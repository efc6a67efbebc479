"""LIMoE: entropy losses for each modality, and slots filled by confidence."""

import math
import warnings

import torch

from pumice.moe import MoE, RouteContext, Routing
from tests.methods.moe_parts import D, E, assigned, balance, draw, tokens

TWO = torch.arange(40) % 2


def plan_of(probability):
    return assigned("token_choice", Routing(probability.clamp_min(1e-30).log(), probability), top_k=1)


def test_local_entropy_by_hand():
    p = draw(40, E).softmax(1)
    entropy = -(p * p.log()).sum(1)
    wanted = (entropy[TWO == 0].mean() + entropy[TWO == 1].mean()) / 2
    torch.testing.assert_close(balance("local_entropy", plan_of(p), RouteContext(modality_T=TWO)), wanted)
    only = balance("local_entropy", plan_of(p), RouteContext(modality_T=TWO), modality=1)
    torch.testing.assert_close(only, entropy[TWO == 1].mean())
    torch.testing.assert_close(balance("local_entropy", plan_of(p)), balance("entropy", plan_of(p)))
    assert balance("local_entropy", plan_of(torch.eye(E)), RouteContext()) == 0


def test_global_entropy_stops_at_its_threshold():
    context = RouteContext(modality_T=torch.zeros(E, dtype=torch.int64))
    even = plan_of(torch.eye(E))
    assert balance("global_entropy", even, context, least=math.log(E) - 1e-3) == 0
    torch.testing.assert_close(
        balance("global_entropy", even, context, least=math.log(E) + 0.5), torch.tensor(0.5), rtol=1e-4, atol=1e-5
    )
    one = plan_of(torch.eye(E)[:1].repeat(E, 1))
    torch.testing.assert_close(balance("global_entropy", one, context, least=1.0), torch.tensor(1.0))
    p = torch.full((8, E), 1 / E, requires_grad=True)
    balance("global_entropy", plan_of(p), context, least=1.0).backward()
    assert not p.grad.any()


def test_a_modality_that_collapses_is_seen_only_where_modalities_are_apart():
    """Images use half of the experts and text one: together they look well spread."""
    images = torch.eye(E)[torch.arange(20) % 7]
    text = torch.eye(E)[torch.full((20,), 7)]
    plan = plan_of(torch.stack([images, text], 1).flatten(0, 1))
    apart = balance("global_entropy", plan, RouteContext(modality_T=TWO), least=math.log(3))
    torch.testing.assert_close(apart, torch.tensor(math.log(3) / 2))
    assert balance("global_entropy", plan, RouteContext(), least=math.log(3)) == 0


def test_confident_tokens_get_the_slots_first():
    torch.manual_seed(0)
    moe = MoE.from_recipe("limoe", D, 8, experts=E, capacity=0.5)
    x = tokens(40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        moe(x, RouteContext(modality_T=TWO))
    plan, routing = moe.plan, moe.plan.routing
    assert plan.load_E.max() <= math.ceil(0.5 * 40 / E)
    assert {"local_entropy", "global_entropy", "importance"} <= set(plan.losses)
    best = routing.weight_TE.max(1)
    for e in range(E):
        asked = (best.indices == e).nonzero().flatten()
        kept = plan.token_A[plan.expert_A == e]
        refused = asked[~torch.isin(asked, kept)]
        if len(refused):
            assert best.values[kept].min() >= best.values[refused].max()
