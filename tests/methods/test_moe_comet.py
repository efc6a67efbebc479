"""COMET: a tree's leaves share mass 1, closed trees leave at most k experts, and the search ends in a permutation."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext
from pumice.moe.route.comet import Comet
from pumice.moe.route.dselect_k import smooth_step
from pumice.moe.route.permuted import Permuted, sinkhorn

D = 8


def made(experts, scale=0.1, **options):
    torch.manual_seed(0)
    router = Comet(D, experts, **options)
    with torch.no_grad():
        router.node_KND.normal_().mul_(scale)
    return router


def walk(router, k, x, node=0, mass=1.0):
    """The tree by recursion: {expert: mass}."""
    inner = router.experts - 1
    if node >= inner:
        return {node - inner: mass}
    left = smooth_step(router.node_KND[k, node] @ x, router.gamma)
    return walk(router, k, x, 2 * node + 1, mass * left) | walk(router, k, x, 2 * node + 2, mass * (1 - left))


@pytest.mark.parametrize("experts", [1, 2, 3, 5, 8, 12])
def test_the_leaves_are_those_of_the_tree_walked_node_by_node(experts):
    router, x = made(experts), torch.randn(3, D)
    mass = router.leaves(x)
    assert mass.shape == (3, 2, experts)
    torch.testing.assert_close(mass.sum(2), torch.ones(3, 2))
    for t in range(3):
        for k in range(2):
            leaves = walk(router, k, x[t])
            by_hand = torch.stack([torch.as_tensor(leaves[e]) for e in range(experts)])
            torch.testing.assert_close(mass[t, k], by_hand.to(mass.dtype))


def test_the_weights_are_a_softmax_over_all_leaves_that_mass_reaches():
    router, x = made(6), torch.randn(5, D)
    mass = router.leaves(x)
    score = torch.einsum("td,ked->tke", x, router.leaf_KED) + router.leaf_bias_KE + mass.log()
    torch.testing.assert_close(
        router(x, RouteContext()).weight_TE, score.flatten(1).softmax(1).view_as(score).sum(1), atol=1e-6, rtol=1e-5
    )


def test_closed_trees_have_at_most_k_experts_and_finite_gradients():
    router, x = made(8, scale=1e4), torch.randn(40, D)
    weight = router(x, RouteContext()).weight_TE
    assert ((weight > 0).sum(1) <= 2).all()
    torch.testing.assert_close(weight.sum(1), torch.ones(40))
    with torch.no_grad():
        router.leaf_KED.mul_(1e5)
    weight = router(x, RouteContext()).weight_TE
    weight.square().sum().backward()
    assert torch.isfinite(weight).all()
    assert all(torch.isfinite(p.grad).all() for p in router.parameters())


def test_the_entropy_closes_the_trees():
    router, x = made(8, scale=0.01, entropy=1.0), torch.randn(16, D)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    assert ((router(x, RouteContext()).weight_TE > 0).sum(1) == 8).all()
    for _ in range(120):
        loss = router(x, RouteContext(training=True)).losses["comet"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((router(x, RouteContext()).weight_TE > 0).sum(1) <= 2).all()


def test_sinkhorn_is_doubly_stochastic_and_cold_is_a_permutation():
    torch.manual_seed(0)
    matrix = sinkhorn(torch.randn(6, 6, dtype=torch.float64), 200)
    torch.testing.assert_close(matrix.sum(0), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(matrix.sum(1), torch.ones(6, dtype=torch.float64))
    router = Permuted(D, 6, router="linear", noise=0.0)
    with torch.no_grad():
        router.log_EE.copy_(torch.eye(6)[[2, 0, 1, 5, 3, 4]])
    soft = router.soft(0.0, None)
    torch.testing.assert_close(soft, torch.eye(6)[[2, 0, 1, 5, 3, 4]])


def test_after_the_search_experts_have_the_columns_of_the_best_permutation():
    torch.manual_seed(0)
    router = Permuted(D, 6, router="linear", noise=0.0)
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    with torch.no_grad():
        router.log_EE.normal_().mul_(0.1).add_(torch.eye(6)[order])
    x = torch.randn(7, D)
    inner = router.inner(x, RouteContext()).weight_TE
    for context in (RouteContext(), RouteContext(training=True), RouteContext(training=True, progress=0.5)):
        weight = router(x, context).weight_TE
        torch.testing.assert_close(weight[:, order], inner)
    soft = router(x, RouteContext(training=True, progress=0.0))
    torch.testing.assert_close(soft.weight_TE[:, order], inner, atol=1e-4, rtol=0)


def test_the_search_learns_and_keeps_the_routers_sparsity():
    torch.manual_seed(0)
    layer = MoE(D, 4, 8, {"name": "permuted", "router": {"name": "comet"}}, "threshold", shared=0)
    with torch.no_grad():
        layer.router.inner.node_KND.mul_(1e4)
    layer(torch.randn(20, D), RouteContext(progress=0.02, generator=torch.Generator().manual_seed(0)))
    layer.plan.importance_E.square().sum().backward()
    assert layer.router.log_EE.grad.abs().sum() > 0
    # A column's mass is shared by few experts at a temperature of 1e-3.
    assert layer.plan.statistics()["per_token"] < 8
    layer(torch.randn(20, D), RouteContext(progress=0.5))
    assert layer.plan.statistics()["per_token"] <= 2


def test_what_cannot_be_is_refused():
    with pytest.raises(PumiceError, match="slots"):
        Permuted(D, 4, router="slots")
    with pytest.raises(PumiceError, match="search"):
        Permuted(D, 4, search=0.0)
    with pytest.raises(PumiceError, match="top_k"):
        Comet(D, 4, top_k=0)
