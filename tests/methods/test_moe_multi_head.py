"""MH-MoE: pieces of a token are routed on their own, so that one token reaches several times as many experts."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext
from pumice.moe.composite.multi_head import MultiHead
from tests.methods.moe_parts import D, E, tokens

PARTS = {"shared": 0, "balance": {}, "top_k": 1}


def make(heads=4, **given):
    torch.manual_seed(0)
    return MultiHead(D, 8, E, {**PARTS, **given}, heads=heads)


def identity(made):
    for linear in (made.split, made.merge):
        torch.nn.init.eye_(linear.weight)
    return made


def test_equals_a_moe_on_the_pieces():
    made, x = identity(make()), tokens(12).view(2, 6, D)
    pieces = made.moe(x.reshape(-1, 4))
    torch.testing.assert_close(made(x), pieces.view(2, 6, D))


def test_one_head_between_identities_is_the_moe():
    made, x = identity(make(heads=1)), tokens(12).view(2, 6, D)
    assert isinstance(made.moe, MoE)
    torch.testing.assert_close(made(x), made.moe(x))


def test_a_token_reaches_more_experts_than_top_k():
    made = make(top_k=2)
    made(tokens(40))
    plan = made.moe.plan
    assert plan.tokens == 160
    experts = torch.stack([plan.expert_A[plan.token_A // 4 == t].unique().numel() * torch.ones(()) for t in range(40)])
    assert experts.max() > 2
    assert experts.max() <= 8


def test_pieces_share_the_sequence_and_the_word():
    made = make(router={"name": "words", "vocabulary": 100})
    ids = torch.arange(12).view(2, 6)
    made(tokens(12).view(2, 6, D), RouteContext(token_ids_T=ids))
    plan = made.moe.plan
    assert torch.equal(plan.expert_A[plan.token_A.argsort()], (torch.arange(12) % E).repeat_interleave(4))


def test_losses_and_empty_input():
    made = make(balance={"load": 1.0})
    (made(tokens(12)).sum() + made.aux_loss).backward()
    assert made.split.weight.grad.any()
    assert made.aux_loss > 0.5
    assert made(tokens(0)).shape == (0, D)
    with pytest.raises(PumiceError, match="heads=3"):
        make(heads=3)
