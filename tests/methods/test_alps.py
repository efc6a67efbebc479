"""ALPS: the refit is exact, the mask is legal and near the best there is, and never worse than simpler ways."""

from itertools import combinations, pairwise

import pytest
import torch

from pumice.core.linalg import damped, refit
from tests.methods.layers import correlated, draw, error, recover, stats_of
from tests.methods.test_obs import constrained_best


@pytest.mark.parametrize("width", [1, 7, 24])
def test_refit_is_the_normal_equations(width):
    h = damped(stats_of(correlated(width=width))["hessian"], 0.01)
    w = draw(5, width)
    kept = draw(5, width) > 0
    kept[0], kept[1] = True, False
    found = refit(h, w, kept, torch.zeros_like(w), steps=4 * width, tolerance=1e-7)
    for row in range(5):
        best = constrained_best(h.double(), w[row].double(), kept[row])
        torch.testing.assert_close(found[row].double(), best, rtol=1e-3, atol=1e-4)
    assert not found[~kept].any()


def test_refit_never_gets_worse_by_a_step():
    h = damped(stats_of(correlated(width=32))["hessian"], 0.01)
    w = draw(6, 32)
    kept = draw(6, 32) > 0.3
    start = w * kept

    def off(v):
        return float((((v - w) @ h) * (v - w)).sum())

    errors = [off(refit(h, w, kept, start, steps=steps)) for steps in range(12)]
    assert errors[0] == pytest.approx(off(start), rel=1e-5)
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_finds_the_best_mask_of_all_more_often_than_not():
    """Brute force over all masks of one row: 5 of 10 inputs."""
    ratios = {"alps": [], "obs": []}
    for seed in range(8):
        x, w = correlated(width=10, seed=seed), draw(1, 10, seed=seed + 50)
        stats = stats_of(x)
        h, dense = damped(stats["hessian"], 0.01).double(), w[0].double()

        def off(v, h=h, dense=dense):
            return float((v - dense) @ h @ (v - dense))

        masks = [torch.tensor([i in keep for i in range(10)]) for keep in combinations(range(10), 5)]
        best = min(off(constrained_best(h, dense, mask)) for mask in masks)
        for name, found in ratios.items():
            new, mask, _ = recover(name, w, stats, scorer=None, density=0.5)
            assert int(mask.sum()) == 5
            found.append(off(new[0].double()) / best)
    assert min(ratios["alps"]) > 0.999
    assert sum(ratio < 1.001 for ratio in ratios["alps"]) >= 4
    assert sum(ratios["alps"]) < 0.8 * sum(ratios["obs"])


@pytest.mark.parametrize("pattern", ["unstructured:layer", "unstructured:row", "2:4", "row", "4x4"])
def test_better_than_column_by_column(pattern):
    x, w = correlated(width=64), draw(48, 64)
    stats = stats_of(x)
    ours, mask, _ = recover("alps", w, stats, scorer=None, pattern=pattern, density=0.5)
    theirs, _, _ = recover("obs", w, stats, scorer=None, pattern=pattern, density=0.5)
    assert error(x, w, ours).sum() < error(x, w, theirs).sum()
    assert not ours[~mask].any()


def test_beside_another_score_only_the_kept_weights_move():
    x, w = correlated(width=32), draw(8, 32)
    stats = stats_of(x)
    new, mask, _ = recover("alps", w, stats, density=0.5, refine=200)
    assert torch.equal(mask, recover("none", w, stats, density=0.5)[1])
    obs, _, _ = recover("obs", w, stats, density=0.5)
    assert error(x, w, new).sum() < error(x, w, obs).sum() < error(x, w, w * mask).sum()
