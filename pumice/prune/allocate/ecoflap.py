"""ECoFLaP's coarse stage: layers are weighed by the loss, with forward passes only."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.progress import bar
from pumice.core.registry import allocation
from pumice.core.view import WeightView
from pumice.prune.allocate.base import Layers, changed, exact, noise, share


def _passes(options: Mapping[str, Any], blocks: int, layers: int) -> int:
    """Batches that the whole model sees."""
    del blocks
    return 2 * layers * options["draws"] * options["batches"]


@allocation("ecoflap", key="ecoflap", paper="arXiv:2310.02998", needs=("loss",), passes=_passes)
def ecoflap(
    layers: Layers,
    density: float,
    *,
    eps: Annotated[float, "size of the perturbation, in units of the weights"] = 1e-3,
    draws: Annotated[int, "random directions for each layer"] = 1,
    batches: Annotated[int, "calibration batches that the loss is taken on"] = 4,
    slack: Annotated[float, "a layer's density is at least the mean less this"] = 0.1,
    group: Annotated[str, "what shares one density: block (its layers' scores are added up) or layer"] = "block",
) -> dict[str, float]:
    """Groups whose weights move the loss more keep more: score = Σ over layers of |L(W + εz) − L(W − εz)| / 2ε, z random.

    Each layer is moved alone, along normal z; the difference is then |zᵀ∇L|, a zeroth-order estimate of the size of the
    layer's gradient (MeZO): no backward pass, and only one layer is held a second time. A group's score is the sum over
    its layers, averaged over the draws. Every layer keeps a floor, `density − slack` (the paper's largest sparsity); the
    rest of the budget is given to the groups in proportion to their score, in numbers of weights; what does not fit into
    a full layer goes to the others. Inside a group all layers have one density. The counts sum to the budget exactly.

    The second stage of the paper is the recipe's own (Wanda or SparseGPT). ε, the sum over a block and a largest sparsity
    of 0.1 above the target are what the authors' program and scripts set. There |zᵀ∇L| is taken on every batch with a new
    z and then added up; here the loss is averaged over the batches first, so that a layer costs 2·draws losses.

    Raises:
        PumiceError: an option out of its range, or the loss does not depend on any group.
    """
    _check(eps, draws, batches, slack, group)
    groups: dict[str, list[WeightView]] = {}
    for view in layers.views:
        groups.setdefault(view.name if group == "layer" else layers.blocks[view.name], []).append(view)
    scores = _scores(layers, groups, eps, draws, batches)
    if not sum(scores.values()) > 0:
        raise PumiceError(f"allocation ecoflap: eps={eps} does not change the loss anywhere: use a larger eps.")
    sizes = {name: sum(view.numel for view in views) for name, views in groups.items()}
    floor = max(0.0, density - slack)
    rest = select.keep_count(sum(sizes.values()), density) - floor * sum(sizes.values())
    more = share(scores, {name: sizes[name] * (1 - floor) for name in sizes}, rest)
    amounts = {
        view.name: view.numel * (floor + more[name] / sizes[name]) for name, views in groups.items() for view in views
    }
    return exact(amounts, layers, density)


def _check(eps: float, draws: int, batches: int, slack: float, group: str) -> None:
    if group not in ("block", "layer"):
        raise PumiceError(f"allocation ecoflap: group={group!r} must be block or layer.")
    for name, value in (("eps", eps), ("draws", draws), ("batches", batches), ("slack", slack)):
        if not value > 0:
            raise PumiceError(f"allocation ecoflap: {name}={value} must be positive.")


def _scores(
    layers: Layers, groups: dict[str, list[WeightView]], eps: float, draws: int, batches: int
) -> dict[str, float]:
    """Size of the loss's central difference along random directions, one layer at a time, added up by group."""
    scores = dict.fromkeys(groups, 0.0)
    count = sum(map(len, groups.values())) * draws
    with bar(count, "allocate (ecoflap)", enabled=layers.progress, unit="direction") as shown:
        for name, views in groups.items():
            for view, draw in itertools.product(views, range(draws)):
                losses = []
                for sign in (1, -1):
                    step = sign * eps
                    with changed([view], lambda v, w, d=draw, s=step: w.add_(noise(v, layers.seed, d), alpha=s)):
                        losses.append(layers.loss(batches, exact=True))
                scores[name] += abs(losses[0] - losses[1]) / (2 * eps * draws)
                shown.update()
    return scores
