"""Densities by dynamic programming over measured errors, within a budget of weights, bytes or time.

Shapes: O outputs, I inputs, G groups, S sampled tokens; a ladder of K densities is tried for every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.linalg import damped_inverse
from pumice.core.registry import allocation, unknown
from pumice.core.view import WeightView
from pumice.prune.allocate import knapsack
from pumice.prune.allocate.base import Block, Cost, Layer, Layers, changed, exact
from pumice.prune.allocate.cost import Budget, own_density, read_budget, show

ERRORS = {"score": {"input"}, "recover": {"input"}, "obs": {"hessian"}}
SENSITIVITIES = {"loss": {"loss"}, "fisher": {"fisher_diag", "input_sqnorm"}, "none": set()}


def _needs(options: Mapping[str, Any]) -> frozenset[str]:
    for name, known in (("errors", ERRORS), ("sensitivity", SENSITIVITIES)):
        if options[name] not in known:
            raise PumiceError(unknown(f"{name} of allocation 'dp'", str(options[name]), known))
    return frozenset(ERRORS[options["errors"]] | SENSITIVITIES[options["sensitivity"]] | {"input_sqnorm"})


def _passes(options: Mapping[str, Any], blocks: int, layers: int) -> int:
    """Batches that the whole model sees."""
    del blocks
    return (layers + 1) * options["batches"] if options["sensitivity"] == "loss" else 0


@allocation(
    "dp",
    paper="arXiv:2201.13096",
    needs=("input_sqnorm",),
    compares_score=True,
    streams=True,
    option_needs=_needs,
    density=own_density,
    passes=_passes,
)
def dp(
    layers: Layers,
    density: float,
    *,
    budget: Annotated[
        str, "what is to be kept: 0.4, 60MB of weight files, 12ms per decoded token; empty: density"
    ] = "",
    errors: Annotated[
        str, "a layer's error: score (mask alone), recover (whole recipe), obs (closed form)"
    ] = "recover",
    sensitivity: Annotated[str, "how layers' errors compare: loss, fisher or none (relative error)"] = "loss",
    step: Annotated[float, "distance of the densities that are tried"] = 0.05,
    batches: Annotated[int, "calibration batches that the loss is taken on"] = 4,
) -> dict[str, float]:
    """The densities with the least sum of measured layer errors that a budget allows, by dynamic programming.

    Every layer is pruned at a ladder of densities (step, 2·step, …, 1) and its output error is taken on calibration inputs
    of the dense model: of the recipe's mask, of the whole recipe with its recovery (costs a solve for each density), or by
    the closed form Σ w²/[H⁻¹]ⱼⱼ over the pruned weights. One choice for each layer is then a multiple-choice knapsack. A
    budget of weights is hit exactly: what the ladder leaves over goes, between its densities, to the layers that gain
    most. Budgets of bytes and time are hit from below.

    Errors of layers are made comparable by a sensitivity. `loss`: a layer alone is pruned to the mean density (half,
    where the budget is no density) and the rise of the loss is divided by its error there (one forward pass per layer and
    batch). `fisher`: output i weighs Σⱼ Fᵢⱼ / Σⱼ E[xⱼ²], which is E[gᵢ²] where gradients and inputs do not depend on each
    other, so that the sum is a second-order estimate of the loss (one backward pass per batch). `none`: ‖XΔ‖²/‖XW‖².

    SPDY, which this follows, looks for the sensitivities by a local search over whole pruned models; they are measured
    directly here. Bytes count whole weight files, milliseconds the pruned linear layers for one row.

    With SparseGPT at 70 % on stories15M it is better than uniform and behind OWL, with Wanda behind uniform (docs/quality.md):
    summed layer errors are not the loss. What it alone can do is keep a budget of bytes or time.

    Raises:
        PumiceError: an unknown budget, errors or sensitivity, or a budget that no assignment meets (names the smallest).
    """
    if not 0 < step <= 0.5 or batches < 1:
        raise PumiceError(f"allocation dp: step={step} must lie in (0, 0.5], and batches={batches} be at least 1.")
    wanted = read_budget(budget) or Budget(density, "density", f"{density:g}")
    ladder = [min(1.0, round(level * step, 6)) for level in range(1, round(1 / step) + 1)]
    ladder[-1] = 1.0
    prices = _Prices(layers, wanted, ladder)
    curves = _curves(layers, ladder, errors, sensitivity, batches, density if wanted.unit == "density" else 0.5)
    names = list(curves)
    costs = [prices.of[name] for name in names]
    limit = prices.limit(names)
    chosen = dict(zip(names, knapsack.solve(costs, [curves[name] for name in names], limit), strict=True))
    if wanted.unit != "density":
        return {name: ladder[choice] for name, choice in chosen.items()}
    return _fill(layers, ladder, curves, chosen, prices, density)


class _Prices:
    """What each layer costs at each density of the ladder, in the budget's unit."""

    def __init__(self, layers: Layers, budget: Budget, ladder: Sequence[float]) -> None:
        self.budget = budget
        self.views = {view.name: view for view in layers.views}
        if budget.unit == "density":
            cost = Cost(lambda view, mask: 0.0)
            self.of = {v.name: [float(select.keep_count(v.numel, d)) for d in ladder] for v in layers.views}
            total = float(select.keep_count(sum(v.numel for v in layers.views), budget.amount))
        else:
            if budget.unit not in layers.costs:
                raise PumiceError(
                    f"budget={budget.text!r}: nothing here knows what layers cost in {budget.unit}; use pumice.prune."
                )
            cost = layers.costs[budget.unit]()
            seen: dict[Any, list[float]] = {}
            self.of = {view.name: _prices_of(layers, view, cost, ladder, seen) for view in layers.views}
            total = budget.amount
        self.total, self.fixed = total, cost.fixed
        least = cost.fixed + sum(min(prices) for prices in self.of.values())
        if least > total:
            scale = sum(v.numel for v in layers.views) if budget.unit == "density" else 1.0
            raise PumiceError(
                f"budget={budget.text!r}: no assignment of densities from {ladder[0]:g} up meets it; the smallest possible "
                f"is {show(least / scale, budget.unit)}. Give more, or a smaller step."
            )

    def limit(self, names: Sequence[str]) -> float:
        """What is left for these layers; the others, which no token reaches, keep the plain density."""
        others = [name for name in self.of if name not in names]
        if self.budget.unit != "density":
            return self.total - self.fixed - sum(self.of[name][-1] for name in others)
        return float(sum(select.keep_count(self.views[name].numel, self.budget.amount) for name in names))


def _prices_of(
    layers: Layers, view: WeightView, cost: Cost, ladder: Sequence[float], seen: dict[Any, list[float]]
) -> list[float]:
    """Costs depend on shape, type and pattern only, so a random mask tells them before any calibration."""
    key = (view.tensor.shape, view.tensor.dtype, view.transposed, view.expert is None, cost.kind(view))
    if key not in seen:
        scores = torch.rand(view.shape_OI, generator=torch.Generator().manual_seed(0))
        seen[key] = [cost.of(view, layers.select(view, scores, density)) for density in ladder]
    return seen[key]


def _curves(
    layers: Layers, ladder: Sequence[float], errors: str, sensitivity: str, batches: int, mean: float
) -> dict[str, list[float]]:
    """Weighted error of every layer at every density of the ladder; layers that no token reaches are absent."""
    curves: dict[str, list[float]] = {}
    rises: dict[str, float] = {}
    probe = min(range(len(ladder) - 1), key=lambda level: abs(ladder[level] - mean))
    base = layers.loss(batches) if sensitivity == "loss" else 0.0

    def visit(block: Block) -> None:
        for layer in block.layers():
            name = layer.view.name
            rows_KO = _errors(layer, ladder, errors)
            if sensitivity == "fisher":
                curves[name] = (rows_KO @ _row_weights(layer)).tolist()
            elif sensitivity == "none":
                curves[name] = (rows_KO.sum(1) / _output_power(layer)).tolist()
            else:
                curves[name] = rows_KO.sum(1).tolist()
                pruned = _pruned(layer, ladder[probe], errors)
                with changed([layer.view], lambda _view, _w, new=pruned: new):
                    rises[name] = layers.loss(batches) - base

    layers.walk(visit)
    if rises:
        # Pruning a layer may lower the loss on few batches; it must not become free for that.
        floor = 0.01 * sorted(rises.values())[len(rises) // 2]
        for name, rise in rises.items():
            at = curves[name][probe]
            scale = max(rise, floor, 1e-9) / at if at > 0 else 0.0
            curves[name] = [scale * error for error in curves[name]]
    return {name: _falling(curve) for name, curve in curves.items()}


def _falling(curve: Sequence[float]) -> list[float]:
    """Never more error with more weights: a recovery's noise would otherwise leave weights unused."""
    found = list(curve)
    for level in range(len(found) - 2, -1, -1):
        found[level] = max(found[level], found[level + 1])
    return found


def _pruned(layer: Layer, density: float, errors: str) -> Tensor:
    return layer.recover(density) if errors == "recover" else layer.w_OI * layer.select(density)


def _errors(layer: Layer, ladder: Sequence[float], errors: str) -> Tensor:
    """Mean squared error of every output at every density, [K, O]."""
    zero = torch.zeros(layer.w_OI.shape[0])
    if errors == "obs":
        saliency = _saliency(layer)
        rows = [(saliency * ~layer.select(density)).sum(1) for density in ladder[:-1]]
    else:
        rows = [_output(layer, layer.w_OI - _pruned(layer, density, errors)) for density in ladder[:-1]]
    return torch.stack([*rows, zero.to(rows[0])]).double()


def _output(layer: Layer, w_OI: Tensor) -> Tensor:
    """E[(w x)²] of every output over the sampled inputs, [O]."""
    x_GSI = layer.stats["input"]
    x_GSI = x_GSI if x_GSI.dim() == 3 else x_GSI[None]
    return (x_GSI @ w_OI.unflatten(0, (len(x_GSI), -1)).mT).square().mean(1).flatten()


def _output_power(layer: Layer) -> float:
    """What all outputs together have, for relative errors; from the sample or from the Hessian."""
    if "input" in layer.stats:
        return max(float(_output(layer, layer.w_OI).sum()), 1e-30)
    h = layer.stats["hessian"]
    h = h if h.dim() == 3 else h[None]
    w_GRI = layer.w_OI.unflatten(0, (len(h), -1))
    return max(float(((w_GRI @ h) * w_GRI).sum()), 1e-30)


def _saliency(layer: Layer) -> Tensor:
    """w²/[H⁻¹]ⱼⱼ, the error that is left when one weight goes and the others make up for it."""
    h = layer.stats["hessian"]
    diagonals = torch.stack([torch.diagonal(damped_inverse(one, 0.01)[0]) for one in (h if h.dim() == 3 else h[None])])
    rows = layer.w_OI.shape[0] // len(diagonals)
    return layer.w_OI.square() / diagonals.repeat_interleave(rows, 0)


def _row_weights(layer: Layer) -> Tensor:
    """E[gᵢ²] of every output from the Fisher diagonal and the inputs' power, [O]."""
    power = layer.stats["input_sqnorm"].sum(-1)
    return (layer.stats["fisher_diag"].sum(1) / power.clamp(min=1e-30)).double()


def _fill(
    layers: Layers,
    ladder: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    chosen: Mapping[str, int],
    prices: _Prices,
    density: float,
) -> dict[str, float]:
    """Spend what the ladder leaves of a budget of weights between its steps, where the error falls most for a weight."""
    counts = {name: prices.of[name][choice] for name, choice in chosen.items()}
    left = prices.limit(list(chosen)) - sum(counts.values())

    def room(name: str) -> float:
        return prices.of[name][min(chosen[name] + 1, len(ladder) - 1)] - prices.of[name][chosen[name]]

    def gain(name: str) -> float:
        level = chosen[name]
        return (curves[name][level] - curves[name][level + 1]) / room(name) if room(name) > 0 else -1.0

    for name in sorted(chosen, key=gain, reverse=True):
        taken = min(left, room(name))
        counts[name] += taken
        left -= taken
    held = {name: view.numel * density for name, view in prices.views.items() if name not in counts}
    return exact({**counts, **held}, layers, density)
