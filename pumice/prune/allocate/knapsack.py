"""The multiple-choice knapsack: one choice for each layer, least error within a budget, solved by dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pumice.core.errors import PumiceError

CELLS = 1 << 16
"""Finest grid of the budget."""


def solve(costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]], budget: float) -> list[int]:
    """The choice for each layer that has the least sum of errors among those whose costs sum to at most `budget`.

    Exact where all costs are whole multiples of one unit and the budget is at most `CELLS` units (above the cheapest
    choice). Otherwise costs are rounded up to a grid of `CELLS` steps, so that the budget is never broken, and what the
    rounding left unused buys single steps, the best error for its cost first.

    Raises:
        PumiceError: even the cheapest choices together cost more.
    """
    rows = [np.asarray(row, dtype=np.float64) for row in costs]
    values = [np.asarray(row, dtype=np.float64) for row in errors]
    least = sum(float(row.min()) for row in rows)
    if least > budget * (1 + 1e-12):
        raise PumiceError(f"budget={budget:g} is not enough for any assignment: the cheapest one costs {least:g}.")
    extra = [row - row.min() for row in rows]
    room = max(0.0, budget - least)
    step = _unit(extra, room)
    steps = [np.ceil(row / step - 1e-6).astype(np.int64) for row in extra]
    cells = math.floor(room / step + 1e-6)
    chosen = _table(steps, values, cells)
    return _spend(chosen, extra, values, room)


def _unit(extra: Sequence[np.ndarray], room: float) -> float:
    """A step that all costs are multiples of, if the grid can hold it, else the grid's own."""
    every = np.concatenate([*extra, [0.0]])
    if room <= 0:
        return max(1.0, float(every.max()))
    if np.all(every == np.round(every)):
        common = float(np.gcd.reduce(every.astype(np.int64)))
        if common > 0 and room / common <= CELLS:
            return common
    return room / CELLS


def _table(steps: Sequence[np.ndarray], errors: Sequence[np.ndarray], cells: int) -> list[int]:
    """best[b]: least error of the layers so far with at most b steps; the choices are read off backwards."""
    best = np.zeros(cells + 1)
    picks = []
    for cost, error in zip(steps, errors, strict=True):
        new, pick = np.full(cells + 1, np.inf), np.zeros(cells + 1, dtype=np.uint16)
        for choice in np.argsort(cost, kind="stable"):
            c = int(cost[choice])
            if c > cells:
                break
            tried = best[: cells + 1 - c] + error[choice]
            better = tried < new[c:]
            new[c:][better] = tried[better]
            pick[c:][better] = choice
        best = new
        picks.append(pick)
    left, chosen = cells, []
    for cost, pick in zip(reversed(steps), reversed(picks), strict=True):
        choice = int(pick[left])
        chosen.append(choice)
        left -= int(cost[choice])
    return chosen[::-1]


def _spend(chosen: list[int], extra: Sequence[np.ndarray], errors: Sequence[np.ndarray], room: float) -> list[int]:
    """Single steps that what is left can pay, the largest fall of error for its cost first."""
    chosen = list(chosen)
    while True:
        left = room - sum(float(row[choice]) for row, choice in zip(extra, chosen, strict=True))
        best: tuple[float, int, int] | None = None
        for layer, (row, error) in enumerate(zip(extra, errors, strict=True)):
            more, gain = row - row[chosen[layer]], error[chosen[layer]] - error
            able = np.flatnonzero((gain > 0) & (more <= left))
            if able.size:
                rate = gain[able] / np.maximum(more[able], 1e-30)
                top = int(rate.argmax())
                if best is None or rate[top] > best[0]:
                    best = (float(rate[top]), layer, int(able[top]))
        if best is None:
            return chosen
        chosen[best[1]] = best[2]
