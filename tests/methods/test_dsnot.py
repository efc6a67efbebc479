"""DSnoT: swaps bring the expected error of every row towards zero and never change how many weights are kept."""

import pytest
import torch

from tests.methods.layers import correlated, draw, recover, stats_of


def expected_error(w_OI, mask_OI, stats):
    return ((w_OI * ~mask_OI) @ stats["input_mean"]).abs()


@pytest.mark.parametrize("pattern", ["unstructured:row", "unstructured:layer", "2:4", "4:8"])
@pytest.mark.parametrize("scorer", ["magnitude", "wanda"])
@pytest.mark.parametrize("seed", range(4))
def test_no_rows_expected_error_grows(pattern, scorer, seed):
    stats, w = stats_of(correlated(width=32, seed=seed)), draw(24, 32, seed=seed)
    _, before, _ = recover("none", w, stats, scorer, pattern)
    new, mask, _ = recover("dsnot", w, stats, scorer, pattern, threshold=0.01)
    old, now = expected_error(w, before, stats), expected_error(w, mask, stats)
    assert (now <= old + 1e-5).all()
    assert now.sum() < old.sum()
    assert torch.equal(mask.sum(1), before.sum(1))
    assert torch.equal(new, w * mask), "kept weights are not touched"
    if ":" in pattern and pattern[0].isdigit():
        n, m = (int(part) for part in pattern.split(":"))
        assert (mask.view(24, -1, m).sum(-1) == n).all()


def by_hand(w, stats, mask, threshold, cycles, power, group):
    """The loop of one row in plain Python."""
    mean, var, size = stats["input_mean"], stats["input_var"], stats["input_sqnorm"].sqrt()
    mask, born, dead = mask.clone(), set(), set()
    for _ in range(cycles):
        error = float((w * mean)[~mask].sum())
        if abs(error) <= threshold:
            break
        sign = 1.0 if error > 0 else -1.0
        grow = [i for i in range(len(w)) if not mask[i] and i not in dead and sign * w[i] * mean[i] > 0]
        if not grow:
            break
        grown = max(grow, key=lambda i: float(sign * w[i] * mean[i] / var[i] ** power))
        near = range(len(w)) if group is None else range(grown // group * group, grown // group * group + group)
        lose = [i for i in near if mask[i] and i not in born and sign * w[i] * mean[i] < 0]
        if not lose:
            break
        lost = min(lose, key=lambda i: float(w[i].abs() * size[i]))
        after = error - float(w[grown] * mean[grown]) + float(w[lost] * mean[lost])
        if after * sign <= 0:
            break
        mask[grown], mask[lost] = True, False
        born.add(grown)
        dead.add(lost)
    return mask


@pytest.mark.parametrize(("pattern", "group"), [("unstructured:row", None), ("2:4", 4)])
@pytest.mark.parametrize("power", [1.0, 0.0, 0.5])
def test_it_is_the_loop_done_by_hand(pattern, group, power):
    stats, w = stats_of(correlated(width=24, seed=3)), draw(40, 24, seed=5)
    _, start, _ = recover("none", w, stats, "wanda", pattern)
    _, mask, _ = recover("dsnot", w, stats, "wanda", pattern, threshold=0.05, cycles=6, power=power)
    truth = torch.stack([by_hand(w[r], stats, start[r], 0.05, 6, power, group) for r in range(40)])
    assert torch.equal(mask, truth)
    assert not torch.equal(mask, start)


def test_it_stops_at_the_threshold_and_after_the_cycles():
    stats, w = stats_of(correlated(width=32)), draw(24, 32)
    _, start, _ = recover("none", w, stats, "wanda")
    assert torch.equal(recover("dsnot", w, stats, "wanda", threshold=1e9)[1], start)
    assert torch.equal(recover("dsnot", w, stats, "wanda", cycles=0)[1], start)
    _, once, _ = recover("dsnot", w, stats, "wanda", cycles=1, threshold=0.0)
    assert ((once != start).sum(1) <= 2).all()
    assert ((once != start).sum(1) == 2).any()


def test_inputs_without_mean_or_variance_change_nothing_and_break_nothing():
    w = draw(8, 16)
    for mean in (torch.zeros(16), torch.ones(16)):
        stats = {"input_mean": mean, "input_var": torch.zeros(16), "input_sqnorm": torch.ones(16)}
        new, mask, _ = recover("dsnot", w, stats, "magnitude")
        assert torch.isfinite(new).all()
        assert (mask.sum(1) == 8).all()
