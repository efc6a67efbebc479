"""What a pruned layer costs: budgets as they are written, and the bytes of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.view import WeightView
from pumice.prune.allocate.base import Cost
from pumice.weights.layouts.base import layout_named, smallest
from pumice.weights.patterns.base import Pattern

SIZES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}
HEADER_BYTES = 120
"""What a header takes for one tensor, at most, beside the name of its parameter: type, shape and place."""


@dataclass(frozen=True)
class Budget:
    """An amount of one unit: density (share of the weights), bytes (of the weight files) or ms (of one pass)."""

    amount: float
    unit: str
    text: str


def read_budget(text: str) -> Budget | None:
    """`"60MB"`, `"12ms"`, `"0.4"` or `"40%"` as a budget; None for an empty text.

    Raises:
        PumiceError: no number, an unknown unit, or an amount that is not positive.
    """
    if not text.strip():
        return None
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zµ%]*)", text.strip().lower())
    try:
        amount = float(match[1]) if match else -1.0
    except ValueError:
        amount = -1.0
    unit = match[2].replace("µ", "u") if match else ""
    known = ["a density (0.4 or 40%)", "kB", "MB", "GB", "kiB", "MiB", "GiB", "us", "ms", "s"]
    if amount <= 0 or not (unit in ("", "%") or unit in SIZES or unit in TIMES):
        raise PumiceError(f"budget={text!r} is no amount with a unit: write one of {', '.join(known)}, as 60MB.")
    if unit in SIZES:
        return Budget(amount * SIZES[unit], "bytes", text)
    if unit in TIMES:
        return Budget(amount * TIMES[unit], "ms", text)
    return Budget(select.check_density(amount / 100 if unit == "%" else amount, "budget"), "density", text)


def own_density(density: float | None, options: Mapping[str, Any]) -> float | None:
    """The density that goes with an allocation's option `budget`, which may replace it.

    Where a budget of bytes or time decides, the density is 1: nothing but the budget takes weights away.

    Raises:
        PumiceError: both are given, or the budget cannot be read.
    """
    budget = read_budget(options["budget"])
    if budget is None:
        return density
    if density is not None and density != 1.0 and density != budget.amount:
        raise PumiceError(f"density={density} and budget={budget.text!r} contradict each other: give one of them.")
    return budget.amount if budget.unit == "density" else 1.0


def show(amount: float, unit: str) -> str:
    """An amount as `read_budget` reads it, not rounded down."""
    if unit == "bytes":
        return f"{amount / 1e6 + 5e-4:.3f}MB"
    return f"{amount + 5e-4:.3f}ms" if unit == "ms" else f"{amount:.4g}"


def stored_bytes(model: nn.Module, pattern: Pattern, views: Sequence[WeightView]) -> Cost:
    """Bytes of the weight files that `save` writes, each weight in its smallest layout; never too few.

    `fixed` is everything else in them: other parameters, buffers and the header. A weight that several modules share is
    stored plainly. Several experts in one tensor share one layout there; their bytes are taken as a bitmask's.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    own = {id(view.tensor) for view in views}
    tensors = {id(t): (name, t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    rest = sum(t.numel() * t.element_size() for key, (_, t) in tensors.items() if key not in own)
    # No layout has more than three tensors.
    header = sum((len(name) + HEADER_BYTES) * (3 if key in own else 1) for key, (name, _) in tensors.items()) + 1024

    def of(view: WeightView, mask_OI: Tensor) -> float:
        size = view.tensor.element_size()
        if owners.get(id(view.tensor), 0) > 1:
            return float(view.numel * size)
        matrix = mask_OI.to(view.tensor.dtype)
        if view.expert is not None:
            return float(layout_named("bitmask").stored_bytes(matrix))
        return float(smallest(matrix, pattern)[0])

    return Cost(of, float(rest + header), lambda view: owners.get(id(view.tensor), 0) > 1)
