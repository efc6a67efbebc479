"""Selection: exact counts, ties by position, N:M, blocks, and the streamed k-th largest against a sort."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.core import select
from pumice.core.errors import PumiceError

FEW = settings(max_examples=60, deadline=None)


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bad", [0, -1, 1.5, "x", None, True, float("nan"), float("inf")])
def test_bad_densities(bad):
    with pytest.raises(PumiceError, match=r"outside \(0, 1\]"):
        select.check_density(bad)


def test_good_densities():
    assert select.check_density(1) == 1.0
    assert select.check_density(1e-9) == 1e-9


@pytest.mark.parametrize(
    ("total", "density", "kept"),
    [(10, 0.7, 7), (10, 0.75, 8), (10, 0.01, 1), (0, 0.5, 0), (1, 0.5, 1), (7, 1.0, 7), (10**9, 0.9, 9 * 10**8)],
)
def test_keep_count(total, density, kept):
    assert select.keep_count(total, density) == kept


@FEW
@given(st.integers(1, 10**9), st.integers(1, 1000))
def test_keep_count_is_the_exact_fraction_rounded_up(total, thousandth):
    assert select.keep_count(total, thousandth / 1000) == max(1, -(-total * thousandth // 1000))


@FEW
@given(st.integers(1, 40), st.integers(0, 10**6))
def test_a_share_made_of_a_count_gives_the_count_back(total, seed):
    kept = 1 + seed % total
    assert select.keep_count(total, kept / total) == kept


def brute_topk(row, keep):
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    mask = [False] * len(row)
    for index in order[:keep]:
        mask[index] = True
    return mask


@FEW
@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(0, 7))
def test_topk_with_ties_is_exact_and_goes_by_position(rows, keep):
    scores = torch.tensor(rows, dtype=torch.float32)
    assert select.topk(scores, keep).tolist() == [brute_topk(row, min(keep, 6)) for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_counts_are_exact_where_everything_ties(dtype):
    scores = torch.zeros(5, 12, dtype=dtype)
    assert (select.rows(scores, 0.25).sum(1) == 3).all()
    assert select.layer(scores, 0.25).sum() == 15
    assert select.layer(scores, 0.25)[0].all()
    assert (select.n_of_m(scores, 2, 4).sum(1) == 6).all()


def test_infinite_scores_are_ordered_and_nan_is_refused():
    scores = torch.tensor([[math.inf, -math.inf, 0.0, 1.0]])
    assert select.topk(scores, 2).tolist() == [[True, False, False, True]]
    scores[0, 2] = math.nan
    with pytest.raises(PumiceError, match="NaN"):
        select.topk(scores, 2)
    with pytest.raises(PumiceError, match="NaN"):
        select.above(scores, 0.5)


def test_above_is_strict():
    assert select.above(torch.tensor([0.0, 0.5, 1.0]), 0.5).tolist() == [False, False, True]


@FEW
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 4), st.integers(0, 10**6))
def test_n_of_m_against_brute_force(n, m, groups, seed):
    n = min(n, m)
    scores = (draw(3, groups * m, seed=seed) * 4).round()
    mask = select.n_of_m(scores, n, m)
    for row in range(3):
        for start in range(0, groups * m, m):
            part = scores[row, start : start + m].tolist()
            assert mask[row, start : start + m].tolist() == brute_topk(part, n)


@pytest.mark.parametrize("per_row", [False, True])
def test_blocks_against_brute_force(per_row):
    scores = draw(8, 12)
    mask = select.blocks(scores, 2, 3, 0.5, per_row=per_row)
    sums = [[float(scores[r : r + 2, c : c + 3].sum()) for c in range(0, 12, 3)] for r in range(0, 8, 2)]
    assert torch.allclose(select.tiles(scores, 2, 3), torch.tensor(sums))
    if per_row:
        kept = [brute_topk(row, 2) for row in sums]
    else:
        flat = brute_topk([value for row in sums for value in row], 8)
        kept = [flat[4 * r : 4 * r + 4] for r in range(4)]
    expected = torch.tensor(kept).repeat_interleave(2, 0).repeat_interleave(3, 1)
    assert torch.equal(mask, expected)


def test_selection_takes_scores_in_any_memory_order():
    scores = draw(12, 8)
    for choose in (
        lambda s: select.blocks(s, 2, 3, 0.5),
        lambda s: select.n_of_m(s, 2, 4),
        lambda s: select.layer(s, 0.3),
        lambda s: select.rows(s, 0.3),
    ):
        assert torch.equal(choose(scores.t()), choose(scores.t().contiguous()))


@FEW
@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 10**6))
def test_streamed_kth_largest_equals_a_sort(values, parts, seed):
    scores = torch.tensor(values)
    k = 1 + seed % len(values)
    found = select.kth_largest_streamed(lambda: scores.tensor_split(parts), k)
    assert found == scores.sort(descending=True).values[k - 1].item()


def test_streamed_kth_largest_at_scale_with_ties_zeros_and_infinity():
    scores = torch.cat([torch.randn(20_000, generator=torch.Generator().manual_seed(1)).abs(), torch.zeros(500)])
    scores[0], scores[1], scores[2:50] = math.inf, -0.0, 0.25
    ordered = scores.sort(descending=True).values
    for k in (1, 2, 7000, 20_000, 20_500):
        assert select.kth_largest_streamed(lambda: scores.split(777), k) == ordered[k - 1].item()


@pytest.mark.parametrize("k", [0, 5])
def test_streamed_kth_outside_the_count(k):
    with pytest.raises(PumiceError, match=f"k={k}"):
        select.kth_largest_streamed(lambda: [torch.ones(4)], k)


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_streamed_kth_refuses_negative_and_nan(value):
    with pytest.raises(PumiceError, match="not negative"):
        select.kth_largest_streamed(lambda: [torch.tensor([1.0, value])], 1)


@pytest.mark.parametrize("n", [(1 << 16) - 1, 1 << 16, 100_003])
@pytest.mark.parametrize("kind", ["plain", "ties", "zeros", "tiny", "signed", "infinite"])
def test_long_rows_keep_what_a_sort_keeps(n, kind):
    """The histogram's threshold is exact, ties go by position, on whatever floats there are."""
    generator = torch.Generator().manual_seed(n)
    scores = torch.rand(n, generator=generator)
    if kind == "ties":
        scores = (scores * 5).floor()
    elif kind == "zeros":
        scores = scores * (scores > 0.9)
        scores[::3] = -0.0
    elif kind == "tiny":
        scores = scores * 1e-42
    elif kind == "signed":
        scores -= 0.5
    elif kind == "infinite":
        scores[::7] = float("inf")
    for keep in (1, 2, n // 3, n - 2, n - 1):
        mask = select.topk(scores, keep)
        order = torch.sort(scores, descending=True, stable=True).indices[:keep]
        expected = torch.zeros(n, dtype=torch.bool)
        expected[order] = True
        assert torch.equal(mask, expected)
