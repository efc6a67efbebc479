"""PEER: product keys find exactly the best of very many one-neuron experts, without a matrix of tokens by experts."""

import pytest
import torch
import torch.nn.functional as F

from pumice.core.errors import PumiceError
from pumice.moe import RouteContext
from tests.methods.moe_parts import layer, router, tokens, training


def scores_of_all(made, x):
    """Every head's score of every expert [T, H, E]: the matrix that the router avoids."""
    query = made._normalised(F.linear(x, made.query_QD), RouteContext()).view(-1, 2, made.heads, made.width)
    rows, columns = query[:, 0] @ made.row_MQ.t(), query[:, 1] @ made.column_NQ.t()
    return (rows[..., :, None] + columns[..., None, :]).flatten(2)


@pytest.mark.parametrize("experts", [144, 150, 13])
def test_finds_exactly_the_best_keys(experts):
    made = router("product_keys", experts=experts, heads=3, keys=5)
    routing = made(tokens(), RouteContext())
    best, index = scores_of_all(made, tokens()).topk(5, dim=2)
    torch.testing.assert_close(routing.logits_TE.view(40, 3, 5), best)
    assert torch.equal(routing.candidate_TC.view(40, 3, 5), index)
    torch.testing.assert_close(routing.weight_TE.view(40, 3, 5), best.softmax(2))


def test_relu_does_not_compete():
    made = router("product_keys", experts=144, gate="relu")
    routing = made(tokens(), RouteContext())
    assert torch.equal(routing.weight_TE, routing.logits_TE.relu())


def test_the_layer_is_the_sum_over_heads_and_neurons():
    moe = layer({"name": "product_keys", "heads": 2, "keys": 4}, experts=64, d_ff=1, kind="neurons", assign="threshold")
    moe.eval()
    x, ex = tokens(), moe.experts
    routing = moe.router(x, RouteContext())
    every = F.gelu(x @ ex.up_proj[:, 0].t())
    mixed = torch.zeros(40, 64).scatter_add(1, routing.candidate_TC, routing.weight_TE) * every
    torch.testing.assert_close(moe(x), mixed @ ex.down_proj[:, 0])
    torch.testing.assert_close(moe.plan.importance_E.sum(), torch.tensor(80.0))


def test_a_hundred_thousand_experts():
    moe = layer({"name": "product_keys", "heads": 2}, experts=100_000, d_ff=1, kind="neurons", assign="threshold")
    biggest = []

    class Largest(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                biggest.append(out.numel())
            return out

    with Largest():
        y = moe(tokens())
    assert max(biggest) < 40 * 100_000, "no matrix of tokens by experts"
    (y.square().sum() + moe.aux_loss).backward()
    assert moe.router.rows * moe.router.columns == 100_000
    assert moe.plan.token_A.shape[0] == 40 * 2 * 16
    touched = moe.experts.down_proj.grad.flatten(1).any(1)
    assert torch.equal(touched.nonzero().flatten(), moe.plan.expert_A.unique())
    assert moe.router.row_MQ.grad.any()


def test_queries_are_normalised_over_the_batch_in_training_and_by_running_statistics_otherwise():
    made = router("product_keys", experts=64)
    x = 3 * tokens(200) + 1
    query = made._normalised(F.linear(x, made.query_QD), training())
    torch.testing.assert_close(query.mean(0), torch.zeros(query.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(query.var(0, unbiased=False), torch.ones(query.shape[1]), atol=1e-3, rtol=0)
    assert made.mean_HQ.any()
    alone = made(x[:1], RouteContext())
    together = made(x, RouteContext())
    torch.testing.assert_close(alone.logits_TE, together.logits_TE[:1])
    assert torch.isfinite(made(x[:1], training()).logits_TE).all()


def test_bad_input():
    with pytest.raises(PumiceError, match="candidates"):
        layer("product_keys", assign="soft")
    with pytest.raises(PumiceError, match="d_key=5"):
        router("product_keys", d_key=5)


def test_several_neurons_an_expert_are_summed_too():
    moe = layer({"name": "product_keys", "heads": 2, "keys": 4}, experts=64, d_ff=3, kind="neurons", assign="threshold")
    moe.eval()
    x, ex = tokens(), moe.experts
    y = moe(x)
    hidden = F.gelu(torch.einsum("td,efd->tef", x, ex.up_proj)) * moe.plan.combine_TE[:, :, None]
    torch.testing.assert_close(y, torch.einsum("tef,efd->td", hidden, ex.down_proj), rtol=1e-4, atol=1e-5)
    assert moe(x[:0]).shape == (0, x.shape[1])
