"""OBS: its saliency is the exact rise of the error, and the recovery is SparseGPT's column-by-column algorithm."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.core.linalg import damped_cholesky, damped_inverse, inverse_factor
from tests.methods.layers import correlated, draw, error, recover, score, stats_of


def constrained_best(h_II, w_I, kept_I):
    """The weights on `kept` that minimise (v-w)ᵀH(v-w), by the normal equations."""
    v = torch.zeros_like(w_I)
    index = kept_I.nonzero().flatten()
    v[index] = torch.linalg.solve(h_II[index][:, index], h_II[index] @ w_I)
    return v


def test_saliency_is_the_rise_of_the_error_after_the_best_compensation():
    x, w = correlated(width=8), draw(3, 8)
    stats = stats_of(x)
    found = score("obs", w, stats, damp=0.0).double()
    h = stats["hessian"].double()
    for row in range(3):
        for column in range(8):
            kept = torch.ones(8, dtype=torch.bool)
            kept[column] = False
            change = constrained_best(h, w[row].double(), kept) - w[row].double()
            assert torch.isclose(found[row, column], change @ h @ change, rtol=1e-2)


def naive_sparsegpt(w_OI, h_II, density, damp, block, group=None):
    """The paper's algorithm column by column: each step inverts the Hessian of the columns that are left."""
    w, h = w_OI.double().clone(), h_II.double().clone()
    width = w.shape[1]
    h += torch.eye(width) * damp * h.diagonal().mean()
    inverses = [torch.linalg.inv(h[c:, c:]) for c in range(width)]
    kept = torch.zeros(w.shape, dtype=torch.bool)
    for column in range(width):
        span = group or block
        if column % span == 0:
            stop = min(column + span, width)
            saliency = torch.stack([w[:, c] ** 2 / inverses[c][0, 0] for c in range(column, stop)], dim=1)
            if group:
                keep = round(group * density)
                best = saliency.topk(keep, dim=1).indices
                kept[:, column:stop] = torch.zeros(saliency.shape, dtype=torch.bool).scatter_(1, best, True)
            else:
                keep = round(saliency.numel() * density)
                flat = torch.zeros(saliency.numel(), dtype=torch.bool)
                flat[saliency.flatten().topk(keep).indices] = True
                kept[:, column:stop] = flat.view(saliency.shape)
        inverse = inverses[column]
        removed = torch.where(kept[:, column], 0.0, w[:, column])
        w[:, column:] -= (removed / inverse[0, 0])[:, None] * inverse[0]
        w[~kept[:, column], column] = 0
    return w, kept


@pytest.mark.parametrize(
    ("pattern", "group", "density"),
    [
        ("unstructured:layer", None, 0.5),
        ("unstructured:layer", None, 0.25),
        ("2:4", 4, 0.5),
        ("4:8", 8, 0.5),
        ("1:4", 4, 0.25),
    ],
)
@pytest.mark.parametrize(("width", "block"), [(32, 8), (40, 16), (24, 128)])
def test_it_is_the_papers_algorithm(pattern, group, density, width, block):
    x, w = correlated(600, width), draw(8, width)
    stats = stats_of(x)
    new, mask, _ = recover("obs", w, stats, None, pattern, density, damp=0.01, block=block)
    truth, kept = naive_sparsegpt(w, stats["hessian"], density, 0.01, block, group)
    assert torch.equal(mask, kept)
    assert torch.allclose(new.double(), truth, rtol=1e-2, atol=2e-3)
    assert torch.equal(new != 0, mask)


@pytest.mark.parametrize(
    "pattern", ["unstructured:row", "unstructured:layer", "2:4", "4x4", "4x4:row", "row", "column"]
)
@pytest.mark.parametrize("scorer", ["magnitude", "wanda", "obs"])
def test_compensation_never_does_worse_than_the_mask_alone(pattern, scorer):
    for seed in range(3):
        x, w = correlated(seed=seed), draw(8, 16, seed=seed)
        stats = stats_of(x)
        new, mask, _ = recover("obs", w, stats, scorer, pattern)
        plain, same, _ = recover("none", w, stats, scorer, pattern)
        assert torch.equal(mask, same)
        assert (new[~mask] == 0).all()
        assert error(x, w, new).sum() <= error(x, w, plain).sum() * 1.0001
        if pattern != "row":
            assert error(x, w, new).sum() < error(x, w, plain).sum()


def test_its_own_mask_beats_a_fixed_one():
    ratios = []
    for seed in range(6):
        x, w = correlated(800, 64, seed), draw(16, 64, seed=seed + 9)
        stats = stats_of(x)
        own = error(x, w, recover("obs", w, stats, None, "unstructured:layer", block=16)[0]).sum()
        ratios.append(float(own / error(x, w, recover("obs", w, stats, "magnitude", "unstructured:layer")[0]).sum()))
    assert max(ratios) < 0.95


def test_a_pruned_prefix_is_compensated_exactly():
    """Where the kept columns all lie to the right, OBS reaches the least-squares optimum of the mask."""
    x = correlated(width=12)
    w = draw(5, 12)
    w[:, :6] *= 1e-3
    new, mask, _ = recover("obs", w, stats_of(x), "magnitude", damp=1e-6)
    assert not mask[:, :6].any()
    h = stats_of(x)["hessian"].double()
    best = torch.stack([constrained_best(h, w[r].double(), mask[r]) for r in range(5)])
    assert torch.allclose(new.double(), best, atol=1e-4)


def test_compensation_goes_most_of_the_way_to_least_squares():
    shares = []
    for seed in range(5):
        x, w = correlated(800, 32, seed), draw(8, 32, seed=seed)
        h = stats_of(x)["hessian"].double()
        new, mask, _ = recover("obs", w, stats_of(x), "wanda")
        best = torch.stack([constrained_best(h, w[r].double(), mask[r]) for r in range(8)])
        optimal, plain = error(x, w, best).sum(), error(x, w, w * mask).sum()
        ours = error(x, w, new).sum()
        assert ours >= optimal * 0.999
        shares.append(float((plain - ours) / (plain - optimal)))
    assert sum(shares) / len(shares) > 0.5


def test_white_inputs_leave_nothing_to_compensate():
    w = draw(6, 16)
    stats = {"hessian": torch.eye(16)}
    new, mask, _ = recover("obs", w, stats, None, "unstructured:layer")
    assert torch.allclose(new, w * mask, atol=1e-6)
    assert torch.equal(mask, w.abs() >= w.abs().flatten().topk(48).values[-1])


def test_dead_inputs_get_zero_weights():
    x = correlated()
    x[:, [0, 5, 15]] = 0
    for scorer in (None, "magnitude"):
        new, mask, _ = recover("obs", draw(8, 16), stats_of(x), scorer, "unstructured:layer")
        assert (new[:, [0, 5, 15]] == 0).all()
        assert torch.isfinite(new).all()
        assert mask.float().mean() == 0.5
    for pattern in ("unstructured:layer", "column", "8x1"):
        for scorer in (None, "obs"):
            _, mask, _ = recover("obs", draw(8, 16), stats_of(x), scorer, pattern)
            assert not mask[:, [0, 5, 15]].any(), "what cannot matter goes first"
    every = recover("obs", draw(8, 16), {"hessian": torch.zeros(16, 16)}, None, "unstructured:layer")[0]
    assert (every == 0).all()


def test_a_singular_hessian_is_damped_and_said():
    x = draw(6, 16)
    x[:, 8:] = x[:, :8]
    new, _, notes = recover("obs", draw(8, 16), stats_of(x), None, "unstructured:layer", damp=0.0)
    assert torch.isfinite(new).all()
    assert len(notes) == 1
    assert "not positive definite with damp 0;" in notes[0]
    assert recover("obs", draw(8, 16), stats_of(x), None, "unstructured:layer")[2] == []


def test_an_indefinite_hessian_is_damped_or_refused():
    h = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    h[0, 1] = h[1, 0] = 1.5
    lower, used = damped_cholesky(h, 0.01)
    assert used > 0.5
    assert torch.allclose(lower @ lower.t(), h + used * torch.eye(4), atol=1e-5)
    h[0, 1] = h[1, 0] = 1e6
    with pytest.raises(PumiceError, match="not positive definite"):
        damped_cholesky(h, 0.01)
    with pytest.raises(PumiceError, match="NaN"):
        damped_cholesky(h * torch.nan, 0.01)
    with pytest.raises(PumiceError, match="damp=-0"):
        damped_cholesky(h, -0.1)


def test_the_factor_and_the_inverse_agree():
    h = stats_of(correlated(width=20))["hessian"]
    upper, used = inverse_factor(h, 0.01)
    inverse, same = damped_inverse(h, 0.01)
    assert used == same == 0.01
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.t() @ upper, inverse, rtol=1e-3, atol=1e-4)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(20)
    assert torch.allclose(inverse @ damped, torch.eye(20), atol=1e-2)


@pytest.mark.parametrize("shape", [(5, 1), (1, 1), (1, 130), (3, 129), (7, 257), (64, 20)])
@pytest.mark.parametrize("density", [0.5, 0.3, 0.01, 1.0])
def test_rows_of_any_length(shape, density):
    w, stats = draw(*shape), stats_of(draw(300, shape[1], seed=3))
    for pattern in ("unstructured:layer", "unstructured:row"):
        new, mask, _ = recover("obs", w, stats, None, pattern, density)
        units = shape[1] if pattern.endswith("row") else w.numel()
        kept = max(1, -(-round(units * density * 1000) // 1000)) * (w.numel() // units)
        assert mask.sum() == kept, "blocks of columns round, the whole does not"
        assert torch.equal(new != 0, mask)
        if density == 1.0:
            assert torch.allclose(new, w)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("pattern", ["16x32", "4x8", "16x32:row"])
def test_blocks_keep_the_density_that_was_asked(pattern, density):
    w, stats = draw(32, 256), stats_of(draw(400, 256, seed=3))
    _, mask, _ = recover("obs", w, stats, None, pattern, density)
    r, c = (int(n) for n in pattern.removesuffix(":row").split("x"))
    per = 256 // c if pattern.endswith("row") else 256 // c * (32 // r)
    kept = -(-round(per * density * 1000) // 1000)
    assert mask.sum() == kept * (32 // r if pattern.endswith("row") else 1) * r * c
    assert (mask.view(32 // r, r, 256 // c, c).float().mean((1, 3)) % 1 == 0).all()


def test_n_of_m_with_blocks_that_are_no_multiple():
    w, stats = draw(8, 48), stats_of(correlated(400, 48))
    one = recover("obs", w, stats, None, "3:6", block=8)
    other = recover("obs", w, stats, None, "3:6", block=128)
    assert (one[1].view(8, 8, 6).sum(-1) == 3).all()
    assert torch.equal(one[1], other[1])
    assert torch.allclose(one[0], other[0], atol=1e-4)


def test_the_block_size_does_not_matter_for_a_fixed_mask():
    w, stats = draw(8, 70), stats_of(correlated(700, 70))
    results = [recover("obs", w, stats, "wanda", block=b)[0] for b in (1, 7, 16, 128)]
    for other in results[1:]:
        assert torch.allclose(results[0], other, rtol=1e-2, atol=1e-3)


def test_the_input_weight_and_statistics_stay_as_they_were():
    w, stats = draw(8, 16), stats_of(correlated())
    before = {name: value.clone() for name, value in stats.items()}
    copy = w.clone()
    recover("obs", w, stats, None, "unstructured:layer")
    assert torch.equal(w, copy)
    assert all(torch.equal(stats[name], before[name]) for name in stats)
