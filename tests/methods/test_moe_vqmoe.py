"""VQMoE: the nearest code names the expert; codes learn by the two halves of vector quantisation."""

import torch

from pumice.moe import RouteContext
from pumice.moe.composite.vqmoe import VQMoE
from tests.methods.moe_parts import D, E, assigned, draw, router, tokens


def test_the_nearest_code_names_the_expert():
    made = router("quantised", codes=3)
    with torch.no_grad():
        made.code_CD.copy_(draw(3 * E, D, seed=3))
    x = tokens()
    plan = assigned("token_choice", made(x, RouteContext()), top_k=1)
    nearest = torch.cdist(x, made.code_CD).argmin(1) % E
    assert torch.equal(plan.expert_A[plan.token_A.argsort()], nearest)
    torch.testing.assert_close(plan.weight_A, torch.ones(40))


def test_losses_move_codes_and_tokens_towards_each_other():
    made, x = router("quantised", commit=0.25), tokens().requires_grad_()
    routing = made(x, RouteContext())
    q = made.code_CD[torch.cdist(x, made.code_CD).argmin(1)]
    torch.testing.assert_close(routing.losses["quantised"], 1.25 * (x - q).square().mean())
    routing.losses["quantised"].backward()
    torch.testing.assert_close(x.grad, 0.25 * 2 * (x - q).detach() / x.numel())
    used = torch.cdist(x, made.code_CD).argmin(1).unique()
    assert made.code_CD.grad[used].any()
    unused = torch.ones(E, dtype=torch.bool).index_fill(0, used, False)
    assert not made.code_CD.grad[unused].any()


def test_the_code_passes_gradients_straight_through():
    made, x = router("quantised"), tokens().requires_grad_()
    code = made(x, RouteContext()).cache["quantised_TD"]
    assert (torch.cdist(code, made.code_CD).amin(1) < 1e-3).all()
    weight = draw(40, D, seed=8)
    (code * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight)
    assert made.code_CD.grad is None


def make(**options):
    torch.manual_seed(0)
    return VQMoE(D, 8, E, {"shared": 0, "top_k": 2, "balance": {}}, **options)


def test_paths_share_experts_and_mix_by_the_gate():
    made, x = make(), tokens(12).view(2, 6, D)
    assert made.discrete.experts is made.moe.experts
    y = made(x)
    made.only_discrete = True
    discrete = made(x)
    gate = made.gate(x).softmax(-1)
    torch.testing.assert_close(y, gate[..., :1] * made.moe(x) + gate[..., 1:] * discrete)


def test_all_tokens_of_a_code_get_the_same_discrete_output():
    made = make(discrete=True)
    x = tokens()
    y = made(x)
    expert = made.discrete.plan.expert_A[made.discrete.plan.token_A.argsort()]
    for e in expert.unique():
        same = y[expert == e]
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-4, atol=1e-5)


def test_losses_and_gradients_reach_everything():
    made, x = make(), tokens(12).view(2, 6, D)
    (made(x).square().sum() + made.aux_loss).backward()
    assert made.aux_loss > 0
    for name in ("moe.router.weight_ED", "discrete.router.code_CD", "gate.weight", "moe.experts.down_proj"):
        assert made.get_parameter(name).grad.any(), name
