"""oBERT: the inverse is the Woodbury recursion's, a group's saliency is the exact rise, and compensation is optimal."""

from itertools import combinations

import pytest
import torch
from torch import nn

from pumice.core.errors import PumiceError
from pumice.core.gradients import model_stats
from pumice.core.view import find_views
from pumice.prune.axes import Axes
from pumice.prune.run import Pruner
from pumice.prune.score.obert import inverse_blocks
from tests.methods import layers
from tests.methods.layers import draw


def score(name, w, stats, **options):
    return layers.score(name, w, stats, **{"diagonal": 0.0, **options})


def recover(name, w, stats, scorer=None, *args, **options):
    return layers.recover(name, w, stats, scorer, *args, **{"diagonal": 0.0, **options})


def layer(o=4, i=16, n=9, seed=0):
    mix = draw(i, i, seed=seed + 5)
    return draw(o, i, seed=seed), {"gradients": draw(o, n, i, seed=seed + 1) @ mix}


def fisher(gradients_ONI, row, columns, damp):
    """One block λI + 1/N Σ g gᵀ in double precision."""
    g = gradients_ONI[row, :, columns].double()
    lam = damp * float(gradients_ONI.double().square().mean())
    return g.t() @ g / len(g) + lam * torch.eye(g.shape[1], dtype=torch.float64)


def optimum(f_BB, w_B, kept_B):
    """The change that minimises ½ δᵀFδ when everything that is not kept becomes zero."""
    delta = -w_B * ~kept_B
    k = kept_B.nonzero().flatten()
    delta[k] = torch.linalg.solve(f_BB[k][:, k], -(f_BB[k] @ delta))
    return delta


@pytest.mark.parametrize("block", [4, 8, 50])
def test_the_inverse_is_what_the_rank_one_updates_give(block):
    w, stats = layer(i=18)
    gradients = stats["gradients"]
    n, width = gradients.shape[1], min(block, 18)
    ((_, _, found),) = inverse_blocks(w, gradients, block, 0.3, 0.0)
    for row in range(4):
        for at, start in enumerate(range(0, 18, width)):
            columns = slice(start, min(start + width, 18))
            g = gradients[row, :, columns].double()
            inverse = torch.eye(g.shape[1], dtype=torch.float64) / (0.3 * float(gradients.double().square().mean()))
            for one in g:
                u = inverse @ one
                inverse -= torch.outer(u, u) / (n + one @ u)
            size = len(inverse)
            torch.testing.assert_close(found[row, at, :size, :size].double(), inverse, rtol=1e-3, atol=1e-4)


def test_the_score_is_the_rise_after_the_best_compensation():
    w, stats = layer()
    found = score("obert", w, stats, block=8, damp=0.2).double()
    for row, column in ((0, 0), (1, 9), (3, 15)):
        start = column // 8 * 8
        f = fisher(stats["gradients"], row, slice(start, start + 8), 0.2)
        kept = torch.arange(8) != column - start
        delta = optimum(f, w[row, start : start + 8].double(), kept)
        assert found[row, column] == pytest.approx(float(delta @ f @ delta / 2), rel=1e-3)


@pytest.mark.parametrize("pattern", ["unstructured:layer", "unstructured:row", "2:4", "2x4", "column:2", "row"])
@pytest.mark.parametrize("scorer", [None, "magnitude"])
def test_compensation_is_the_optimum_of_its_block(pattern, scorer):
    w, stats = layer()
    new, mask, _ = recover("obert", w, stats, scorer, pattern, block=8, damp=0.2)
    for row in range(4):
        for start in (0, 8):
            columns = slice(start, start + 8)
            f = fisher(stats["gradients"], row, columns, 0.2)
            truth = w[row, columns].double() + optimum(f, w[row, columns].double(), mask[row, columns])
            torch.testing.assert_close(new[row, columns].double(), truth * mask[row, columns], rtol=1e-3, atol=1e-4)


def test_blocks_of_the_pattern_are_judged_together():
    """The dropped 2 x 4 blocks are those of least ½ w_Qᵀ([F⁻¹]_QQ)⁻¹w_Q, summed over their rows."""
    w, stats = layer()
    _, mask, _ = recover("obert", w, stats, None, "2x4", block=8, damp=0.2)
    cost = torch.zeros(2, 4)
    for row in range(4):
        for group in range(4):
            start = group // 2 * 8
            f = fisher(stats["gradients"], row, slice(start, start + 8), 0.2)
            kept = torch.ones(8, dtype=torch.bool)
            kept[group * 4 - start : group * 4 - start + 4] = False
            delta = optimum(f, w[row, start : start + 8].double(), kept)
            cost[row // 2, group] += float(delta @ f @ delta / 2)
    expected = cost >= cost.flatten().topk(4).values[-1]
    assert torch.equal(mask, expected.repeat_interleave(2, 0).repeat_interleave(4, 1))


def test_n_of_m_drops_the_cheapest_pair_of_each_four():
    w, stats = layer(o=12, seed=3)
    _, mask, _ = recover("obert", w, stats, None, "2:4", block=8, damp=0.02)
    singles = score("obert", w, stats, block=8, damp=0.02)
    differs = 0
    for row in range(12):
        for start in range(0, 16, 4):
            first = start // 8 * 8
            f = fisher(stats["gradients"], row, slice(first, first + 8), 0.02)
            costs = {}
            for keep in combinations(range(4), 2):
                kept = torch.ones(8, dtype=torch.bool)
                for column in set(range(4)) - set(keep):
                    kept[start - first + column] = False
                delta = optimum(f, w[row, first : first + 8].double(), kept)
                costs[keep] = float(delta @ f @ delta)
            best = min(costs, key=costs.__getitem__)
            assert tuple(mask[row, start : start + 4].nonzero().flatten().tolist()) == best
            differs += set(singles[row, start : start + 4].topk(2).indices.tolist()) != set(best)
    assert differs, "else the pairs need not be judged together"


def test_the_loss_of_a_linear_model_rises_as_predicted():
    """Squared loss of one output with residuals ±1: the empirical Fisher is the Hessian, one row one block."""
    torch.manual_seed(0)
    x, w = draw(400, 8), draw(1, 8)
    model = nn.Linear(8, 1, bias=False)
    model.weight.data.copy_(w)
    signs = (torch.arange(400) % 2 * 2 - 1.0)[:, None]
    goal = (x @ w.t() + signs).detach()
    batches = [(x[t : t + 1], goal[t : t + 1]) for t in range(400)]
    stats = model_stats(
        model, find_views(model), batches, frozenset({"gradients"}), lambda m, b: (m(b[0]) - b[1]).square().sum() / 2
    )
    found = score("obert", w, stats["weight"], damp=1e-6)
    h = (x.t() @ x / 400).double()
    truth = w.double().square() / (2 * torch.diagonal(torch.linalg.inv(h)))
    torch.testing.assert_close(found.double(), truth, rtol=1e-3, atol=1e-5)


def test_gradients_are_those_of_single_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    batches = [draw(1, 5, seed=s) for s in range(4)]
    loss = lambda m, b: m(b).pow(2).mean()  # noqa: E731
    found = model_stats(model, find_views(model), batches, frozenset({"gradients", "fisher_diag"}), loss)
    for view in find_views(model):
        every = torch.stack([torch.autograd.grad(loss(model, b), view.tensor)[0] for b in batches], 1)
        assert torch.allclose(found[view.name]["gradients"], every, atol=1e-7)
        assert torch.allclose(found[view.name]["fisher_diag"], every.square().mean(1), atol=1e-9)


def test_gradients_that_do_not_fit_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("pumice.core.gradients._free_bytes", lambda device: 1000)
    model = nn.Linear(10, 10)
    with pytest.raises(PumiceError, match=r"3 batches take 1,200 bytes .* take samples=1"):
        model_stats(model, find_views(model), [draw(1, 10)] * 3, frozenset({"gradients"}), lambda m, b: 1 / 0)


def test_a_run_says_what_the_gradients_took():
    model = nn.Sequential(nn.Linear(6, 6))
    axes = Axes.make("obert", recover="obert", density=0.5)
    result = Pruner(
        model, axes, [draw(1, 6, seed=s) for s in range(3)], loss=lambda m, b: m(b).sum(), progress=False
    ).run()
    assert any("3 batches took 432 bytes" in note for note in result.notes)


def test_the_diagonal_share_weakens_pairs_only():
    """With all of it the score is λ and the diagonal Fisher; F's own diagonal grows by the share."""
    w, stats = layer()
    g = stats["gradients"]
    ((_, _, found),) = inverse_blocks(w, g, 8, 0.2, 2.0)
    f = torch.linalg.inv(found[1, 1].double())
    plain = fisher(g, 1, slice(8, 16), 0.2)
    own = g[1, :, 8:].double().square().mean(0)
    torch.testing.assert_close(f, plain + 2 * torch.diag(own), rtol=1e-3, atol=1e-3)
    ranks = score("obert", w, stats, diagonal=1e4, damp=1e-6)
    torch.testing.assert_close(ranks / 1e4, w.square() * g.square().mean(1) / 2, rtol=1e-2, atol=1e-4)


def test_bad_options():
    w, stats = layer()
    with pytest.raises(PumiceError, match="diagonal=-1"):
        score("obert", w, stats, diagonal=-1.0)
    with pytest.raises(PumiceError, match="block=0"):
        score("obert", w, stats, block=0)
    with pytest.raises(PumiceError, match="damp=0"):
        score("obert", w, stats, damp=0.0)
    dead = score("obert", w, {"gradients": torch.zeros(4, 3, 16)})
    assert torch.isfinite(dead).all()
