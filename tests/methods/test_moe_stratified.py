"""Stratified MoE: experts of strictly later strata, between one and L of them for a token."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext
from pumice.moe.composite.stratified import Stratified
from tests.methods.moe_parts import D, E, draw, tokens


def make(strata=4, **given):
    torch.manual_seed(0)
    made = Stratified(D, 8, E, {"balance": {}, **given}, strata=strata)
    with torch.no_grad():
        for number, stage in enumerate(made.stages):
            stage.router.weight_ED.copy_(draw(E - number * made.each, D, seed=number))
    return made


def by_hand(made, x):
    """One token at a time; also the strata it went through."""
    ys, paths = [], []
    for row in x:
        h, at, path = row[None], 0, []
        while at < made.strata:
            seen = h if at == 0 else made.norms[at - 1](h)
            first = at * made.each
            weight, expert = (seen @ made.stages[at].router.weight_ED.t()).softmax(1).max(1)
            expert = int(expert) + first
            ex = made.stages[0].experts
            h = h + weight * (ex.down_proj[expert] @ (ex.up_proj[expert] @ seen[0]).relu())
            path.append(expert // made.each)
            at = path[-1] + 1
        ys.append(h[0] - row)
        paths.append(path)
    return torch.stack(ys), paths


def test_equals_the_walk_of_each_token():
    made, x = make(), tokens()
    y, paths = by_hand(made, x)
    torch.testing.assert_close(made(x), y, rtol=1e-4, atol=1e-5)
    assert made.experts_T.tolist() == [len(path) for path in paths]
    assert all(path == sorted(set(path)) for path in paths)
    assert all(path[-1] < 4 for path in paths)
    assert len(set(made.experts_T.tolist())) > 2, "capacity is dynamic"


def test_one_stratum_is_an_ordinary_layer():
    made, x = make(strata=1), tokens()
    plain = MoE(D, 8, made.stages[0].experts, top_k=1, shared=0, balance={})
    with torch.no_grad():
        plain.router.weight_ED.copy_(made.stages[0].router.weight_ED)
    torch.testing.assert_close(made(x), plain(x))
    assert made.experts_T.tolist() == [1] * 40


def test_every_gate_has_its_own_loss_and_gradient():
    made = make(balance={"load": 1.0})
    x = tokens(40).view(2, 20, D)
    (made(x, RouteContext(token_ids_T=torch.arange(40))).square().sum() + made.aux_loss).backward()
    assert len(made.inner()) == 4
    assert all(stage.router.weight_ED.grad.any() for stage in made.stages[:3])
    torch.testing.assert_close(made.aux_loss, sum(stage.aux_loss for stage in made.stages))


def test_experts_are_one_pool_and_empty_input_is_fine():
    made = make()
    assert len({id(stage.experts) for stage in made.stages}) == 1
    assert made(tokens(0)).shape == (0, D)
    for given, match in (({"strata": 3}, "strata=3"), ({"top_k": 2}, "top_k")):
        with pytest.raises(PumiceError, match=match):
            make(**given)
