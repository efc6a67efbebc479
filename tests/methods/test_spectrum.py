"""Spectrum-preserving pruning: unbiased draws at an exact density, and singular values that a cut would lose."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.prune.run import random_scores
from tests.methods.layers import draw, recover


def sparsify(w, seed=0, pattern="unstructured:layer", density=0.5, **options):
    new, mask, _ = recover(
        "spectrum", w, {"random": random_scores(tuple(w.shape), seed, "x")}, None, pattern, density, **options
    )
    return new, mask


@pytest.mark.parametrize("pattern", ["unstructured:layer", "unstructured:row", "2:4"])
def test_the_density_is_exact_and_without_a_lot_it_is_magnitude(pattern):
    w = draw(12, 16)
    plain = recover("none", w, {}, "magnitude", pattern)
    assert torch.equal(sparsify(w, pattern=pattern, medium=0.0)[0], plain[0])
    for medium in (0.1, 0.5, 1.0):
        new, mask = sparsify(w, pattern=pattern, medium=medium)
        assert torch.equal(new != 0, mask)
        by_set = mask.view(-1, 4).sum(1) if pattern == "2:4" else mask.sum(1)
        assert int(mask.sum()) == int(plain[1].sum())
        assert pattern == "unstructured:layer" or len(by_set.unique()) == 1
        # Of two weights that a group of four keeps, a tenth is none.
        assert torch.equal(mask, plain[1]) == (pattern == "2:4" and medium == 0.1)


@pytest.mark.parametrize("pattern", ["unstructured:layer", "unstructured:row", "2:4"])
def test_the_expected_weight_is_the_weight(pattern):
    """With everything in the lot the mean over draws is W itself; with a tenth, W without what is cut."""
    w = draw(3, 8)
    draws = torch.stack([sparsify(w, seed, pattern, medium=1.0)[0] for seed in range(4000)])
    off = (draws.mean(0) - w).abs() / (draws.std(0) / 4000**0.5 + 1e-9)
    assert off[draws.std(0) > 0].max() < 4.5
    assert torch.allclose(draws.mean(0)[draws.std(0) == 0], w[draws.std(0) == 0])
    assert (draws.std(0) > 0).float().mean() > 0.3


def test_large_weights_stay_and_small_ones_go():
    w = draw(20, 20)
    ranked = w.abs().flatten().sort(descending=True).values
    large, small = ranked[179], ranked[220]
    kept = torch.zeros(20, 20)
    for seed in range(50):
        new, mask = sparsify(w, seed, medium=0.1)
        assert torch.equal(new[w.abs() >= large], w[w.abs() >= large])
        assert not new[w.abs() <= small].any()
        kept += mask
    lot = (w.abs() < large) & (w.abs() > small)
    assert int(lot.sum()) == 40
    assert 0 < kept[lot].min() < kept[lot].max() < 50.1


def test_a_larger_weight_is_drawn_more_often_and_scaled_less():
    w = torch.linspace(0.2, 1, 16)[None]
    draws = torch.stack([sparsify(w, seed, density=0.25, medium=1.0)[0][0] for seed in range(2000)])
    lot = (draws != 0).float().mean(0)[8:]
    assert (lot.diff() > -0.03).all()
    assert lot[-1] > 1.5 * lot[0]
    scale = (draws / w).clamp(min=0)
    assert scale[draws != 0].min() >= 1
    assert scale.amax(0)[-1] < scale.amax(0)[8]


def test_a_direction_made_of_small_entries_survives():
    """An all-small rank-one part beside a few large entries: the cut removes its singular value, the lot keeps it."""
    small = 0.1 * torch.ones(40, 40) * (1 + 0.01 * draw(40, 40))
    w = small.clone()
    w[:20] *= 1.5
    top = torch.linalg.svdvals(w)[0]
    cut = recover("none", w, {}, "magnitude", "unstructured:layer")[0]
    errors = [torch.linalg.matrix_norm(sparsify(w, seed, medium=1.0)[0] - w, 2) for seed in range(5)]
    assert torch.linalg.matrix_norm(cut - w, 2) > 0.5 * top
    assert max(errors) < 0.4 * top
    drawn = torch.linalg.svdvals(sparsify(w, 1, medium=1.0)[0])[0]
    assert abs(drawn - top) < 0.5 * abs(torch.linalg.svdvals(cut)[0] - top)


def test_zero_weights_in_the_lot_stay_zero_and_finite():
    w = draw(4, 8)
    w[:, 2:] = 0
    new, mask = sparsify(w, medium=1.0)
    assert torch.isfinite(new).all()
    assert int(mask.sum()) == 16


def test_bad_share():
    with pytest.raises(PumiceError, match=r"medium=1\.5"):
        sparsify(draw(4, 4), medium=1.5)
