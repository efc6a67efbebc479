"""BlockFFN: ReLU decides who fires, the norm how strongly; two losses make chunks of tokens share experts."""

import torch
import torch.nn.functional as F

from pumice.moe import RouteContext, Routing
from pumice.moe.balance.chunks import chunks
from tests.methods.moe_parts import E, assigned, balance, draw, layer, router, tokens


def plan_of(logits):
    weight = logits.relu()
    return assigned("threshold", Routing(logits, weight))


def test_fires_where_the_logit_is_positive_with_unit_mean_square():
    routing = router("blockffn")(tokens(), RouteContext())
    assert torch.equal(routing.weight_TE > 0, routing.logits_TE > 0)
    fired = (routing.logits_TE > 0).any(1)
    torch.testing.assert_close(
        routing.weight_TE[fired].square().mean(1), torch.ones(int(fired.sum())), rtol=1e-3, atol=0
    )


def test_the_norm_ignores_the_scale_of_the_token():
    made = router("blockffn", eps=1e-12)
    torch.testing.assert_close(made(tokens(), RouteContext()).weight_TE, made(10 * tokens(), RouteContext()).weight_TE)


def test_the_layer_is_the_formula_over_all_experts():
    moe = layer("blockffn", assign="threshold", kind={"name": "mlp", "activation": "silu"}, experts=12, d_ff=2)
    x = tokens()
    r = F.rms_norm(F.linear(x, moe.router.weight_ED).relu(), (12,), eps=1e-6)
    every = torch.einsum(
        "edf,tef->ted", moe.experts.down_proj, F.silu(torch.einsum("efd,td->tef", moe.experts.up_proj, x))
    )
    torch.testing.assert_close(moe(x), torch.einsum("te,ted->td", r, every))
    assert 0 < moe.statistics()["per_token"] < 12


def test_gradients_reach_the_logits_of_all_that_fire():
    logits = draw(20, E).requires_grad_()
    weight = F.rms_norm(logits.relu(), (E,))
    plan = assigned("threshold", Routing(logits, weight))
    (plan.weight_A * draw(len(plan.weight_A), seed=4)).sum().backward()
    several = (logits > 0).sum(1) > 1
    assert torch.equal((logits.grad != 0)[several], (logits > 0)[several])


def test_locality_by_hand_and_only_within_a_sequence():
    logits = 0.02 * draw(6, E)
    segment = torch.tensor([0, 0, 0, 1, 1, 1])
    p = (100 * logits).sigmoid()
    pairs = [(0, 1), (1, 2), (3, 4), (4, 5)]
    wanted = torch.stack([F.binary_cross_entropy(p[b], p[a]) for a, b in pairs]).mean()
    loss = balance("chunk_locality", plan_of(logits), RouteContext(segment_T=segment, batch=2))
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    same = torch.tensor([[1.0, -1.0] * 4]).repeat(5, 1)
    assert balance("chunk_locality", plan_of(same)) < 1e-6
    assert balance("chunk_locality", plan_of(same * torch.tensor([1.0, -1, 1, -1, 1])[:, None])) > 50


def test_chunks_end_with_their_segments():
    segment = torch.tensor([0] * 5 + [1] * 3)
    assert chunks(segment, 2).tolist() == [0, 0, 1, 1, 2, 3, 3, 4]


def test_sparsity_is_the_share_of_experts_that_a_chunk_touches():
    one_hot = torch.eye(E)[torch.tensor([0, 0, 1, 1])]
    torch.testing.assert_close(balance("chunk_sparsity", plan_of(one_hot), chunk=4), torch.tensor(2 / E))
    torch.testing.assert_close(balance("chunk_sparsity", plan_of(one_hot), chunk=2), torch.tensor(1 / E))
    p = draw(8, E).softmax(1).requires_grad_()
    loss = balance("chunk_sparsity", plan_of(p), chunk=4)
    by_hand = torch.stack([1 - (1 - part).prod(0) for part in p.split(4)]).mean()
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert torch.isfinite(p.grad).all()
