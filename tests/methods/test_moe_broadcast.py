"""GW-MoE: in training uncertain tokens go to all experts; evaluation is plain token choice."""

import math

import torch

from pumice.moe import RouteContext, Routing
from pumice.moe.assign.broadcast import normalised_entropy
from tests.methods.moe_parts import E, assigned, draw, training


def routing(renormalise=False):
    firm, unsure = draw(10, E) * 6, draw(10, E) * 0.01
    logits = torch.cat([firm, unsure])
    return Routing(logits, logits.softmax(1), renormalise=renormalise)


def test_entropy_is_one_for_uniform_and_zero_for_firm_rows():
    p = torch.stack([torch.full((E,), 1 / E), torch.eye(E)[0], torch.tensor([0.5, 0.5] + [0.0] * (E - 2))])
    wanted = torch.tensor([1.0, 0.0, math.log(2) / math.log(E)])
    torch.testing.assert_close(normalised_entropy(Routing(p, p)), wanted)


def test_uncertain_tokens_reach_every_expert_in_training():
    plan = assigned("broadcast", routing(), training(), top_k=2)
    each = torch.bincount(plan.token_A, minlength=20)
    assert each.tolist() == [2] * 10 + [E] * 10
    unsure = plan.token_A >= 10
    torch.testing.assert_close(plan.weight_A[unsure].sum(), torch.tensor(10.0))


def test_evaluation_is_token_choice():
    for renormalise in (False, True):
        given = routing(renormalise)
        plan = assigned("broadcast", given, RouteContext(), top_k=2)
        torch.testing.assert_close(plan.combine_TE, assigned("token_choice", given, top_k=2).combine_TE)


def test_renormalised_weights_sum_up_to_one_either_way():
    plan = assigned("broadcast", routing(True), training(), top_k=2)
    torch.testing.assert_close(plan.combine_TE.sum(1), torch.ones(20))


def test_limits():
    assert assigned("broadcast", routing(), training(), uncertain=-0.1).load_E.tolist() == [20] * E
    assert assigned("broadcast", routing(), training(), uncertain=1.1).load_E.sum() == 40
