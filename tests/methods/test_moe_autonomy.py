"""Autonomy-of-Experts: the norm of a partial product ranks, and the product is used again, not made again."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from pumice.kernels import reference
from pumice.moe import Plan, RouteContext
from tests.methods.moe_parts import D, E, layer, tokens


def make(**given):
    return layer("autonomy", kind={"name": "autonomous", "rank": 4}, top_k=2, **given)


def by_hand(moe, x):
    """The paper's formula, token by token and expert by expert."""
    ex = moe.experts
    low = torch.einsum("erd,td->ter", ex.low_proj, x)
    norm, best = low.norm(dim=2).topk(2, dim=1)
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for weight, e in zip(norm[t].softmax(0), best[t], strict=True):
            gate = ex.gate_proj[e] @ low[t, e]
            y[t] += weight * (ex.down_proj[e] @ (torch.nn.functional.silu(gate) * (ex.up_proj[e] @ x[t])))
    return y


def test_equals_the_formula():
    moe, x = make(), tokens()
    torch.testing.assert_close(moe(x), by_hand(moe, x))


def test_the_partial_product_is_made_once(monkeypatch):
    def plain(x, weight, plan, *, gather, scatter):
        """The reference, whose products PyTorch's counter sees."""
        of_tokens = (plan.token_A if gather else None, plan.token_A if scatter else None)
        scale = plan.weight_A if scatter else None
        return reference.grouped_linear(
            x, weight, plan.offsets_E1, None, *of_tokens, scale, plan.tokens if scatter else 0
        )

    monkeypatch.setattr("pumice.moe.experts.autonomous.grouped_linear", plain)
    moe, x = make(), tokens(40)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        moe(x)
    ranking = 2 * 40 * E * 4 * D
    assert moe.experts.flops(40, 80) == ranking + 2 * 80 * 8 * (4 + 2 * D)
    assert counter.get_total_flops() == moe.experts.flops(40, 80)


def test_the_cached_product_equals_a_fresh_one():
    moe, x = make(), tokens()
    cached = moe(x)
    moe.plan.routing = None
    torch.testing.assert_close(cached, moe.experts(x, moe.plan))


def test_gradients_reach_the_low_rank_product_through_both_ways():
    moe, x = make(), tokens()
    moe(x).sum().backward()
    both = moe.experts.low_proj.grad.clone()
    moe.zero_grad()
    routing = moe.router(x, RouteContext(experts=moe.experts))
    frozen = Plan.top_k(routing.weight_TE.topk(2).indices, moe.plan.weight_A.new_full((40, 2), 0.5), E)
    moe.experts(x, frozen).sum().backward()
    assert both.any()
    assert not torch.allclose(both, moe.experts.low_proj.grad)


def test_a_segment_router_leaves_no_products_of_tokens():
    moe = make(by="segment")
    x = tokens(12).view(2, 6, D)
    moe(x)
    assert "low_TER" not in moe.plan.routing.cache
    assert moe.plan.routing.cache == {}


def test_half_precision():
    moe = make().to(torch.bfloat16)
    assert moe(tokens().bfloat16()).dtype is torch.bfloat16
    assert moe.plan.routing.logits_TE.dtype is torch.float32
