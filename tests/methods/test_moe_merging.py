"""SMEAR and MEO: one merged expert a sequence; MEO's narrow block in front tells its tokens apart."""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from pumice.moe import MoE
from pumice.moe.composite.token_attention import TokenAttention
from tests.methods.moe_parts import D, E, tokens


def recipe(name, experts=E, **given):
    torch.manual_seed(0)
    return MoE.from_recipe(name, D, 8, experts=experts, **given)


def x():
    return tokens(12).view(2, 6, D)


def merged(moe, weight_E, rows):
    ex = moe.experts
    up, down = (torch.einsum("e,eoi->oi", weight_E, w) for w in (ex.up_proj, ex.down_proj))
    bias_up, bias_down = (weight_E @ getattr(ex, name) if hasattr(ex, name) else 0 for name in NAMES)
    return F.gelu(rows @ up.t() + bias_up) @ down.t() + bias_down


NAMES = ("up_proj_bias", "down_proj_bias")


def test_smear_runs_the_average_of_all_experts():
    moe = recipe("smear").eval()
    y = moe(x())
    for row, out in zip(x(), y, strict=True):
        p = moe.router.linear(moe.router.norm(row.mean(0))).softmax(0)
        torch.testing.assert_close(out, merged(moe, p, row), rtol=1e-4, atol=1e-5)


def test_meo_runs_the_sum_of_the_best_two():
    moe = recipe("meo")
    y = moe(x())
    for row, out in zip(x(), y, strict=True):
        p = (moe.router.weight_ED @ row.mean(0)).softmax(0)
        kept = torch.zeros(E).index_put((p.topk(2).indices,), p.topk(2).values)
        torch.testing.assert_close(out, merged(moe, kept, row), rtol=1e-4, atol=1e-5)


def test_the_router_learns_without_an_estimator():
    moe = recipe("smear", router={"name": "smear", "dropout": 0.0})
    moe(x()).square().sum().backward()
    assert moe.router.linear.weight.grad.abs().sum(1).min() > 0, "every expert's row has a gradient"


def test_the_token_block_starts_as_nothing_and_is_cheap():
    made = recipe("meo-token")
    assert isinstance(made, TokenAttention)
    assert torch.equal(made(x()), made.moe(x()))
    with torch.no_grad():
        made.up.weight.normal_()
        wanted = made.moe(x() + made.up(made.down(x()).relu()))
        assert torch.equal(made(x()), wanted)
        with FlopCounterMode(display=False) as counter:
            made.up(made.down(x()))
    assert counter.get_total_flops() == 2 * 12 * 2 * D * (D // 16)


def test_merging_costs_one_expert_a_token_whatever_k():
    moe = recipe("meo")
    moe(x())
    assert moe.plan.by_group().token_A.shape == (12,)
    assert moe.plan.weight_GE.shape == (2, E)
    assert (moe.plan.weight_GE > 0).sum(1).tolist() == [2, 2]
