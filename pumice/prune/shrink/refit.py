"""Units removed block by block, and what reads them refitted by least squares. Letters: O outputs, I inputs, K kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.linalg import damped
from pumice.core.progress import bar
from pumice.core.stream import Collect, Stream, Unit
from pumice.core.view import WeightView
from pumice.prune.shrink.base import Job
from pumice.prune.trace import Group, remove_all

REFITS = ("none", "layer", "dense")
Cuts = Sequence[tuple[Group, Tensor]]
"""Groups with the masks [U] of the units that stay."""


def check_refit(refit: str) -> None:
    if refit not in REFITS:
        raise PumiceError(f"option refit={refit!r} is not known: use one of {', '.join(REFITS)}.")


def cut(model: nn.Module, cuts: Cuts, batches: Sequence[Any], job: Job, refit: str, damp: float = 0.01) -> None:
    """Remove units; what reads them is refitted as `refit` says.

    `layer`: each reader comes as near as it can to what it gave on the same inputs. `dense`: to what it gave in the dense
    model, on the inputs that the pruned blocks before it send; errors of earlier blocks are then made good as far as the
    layer can. `none`: no refit.
    """
    check_refit(refit)
    if refit == "none":
        remove_all(model, list(cuts))
        return
    readers: dict[str, tuple[WeightView, Tensor, int]] = {}
    for index, (group, mask) in enumerate(cuts):
        for name, (view, columns_Um) in group.views(model).items():
            readers[name] = view, columns_Um[mask.cpu()].flatten().sort().values, index
    views = [view for view, _, _ in readers.values()]
    stream = Stream(model, views, batches, compute=job.compute, dense=refit == "dense")
    needs = frozenset({"hessian", "drift"} if refit == "dense" else {"hessian"})
    left = set(range(len(cuts)))
    with bar(len(stream.units), "remove and refit", enabled=job.progress, unit="block") as shown:

        def visit(unit: Unit, collect: Collect) -> None:
            stats = collect(needs)
            new = {}
            for view in unit.views:
                own, kept = stats.get(view.name, {}), readers[view.name][1]
                if own:
                    goal = own["hessian"][0] + own["drift"][0] if refit == "dense" else own["hessian"][0]
                    new[view.name] = refitted(view.read(), own["hessian"][0], goal, kept, damp)
            here = {readers[view.name][2] for view in unit.views} & left
            remove_all(model, [(cuts[index][0], cuts[index][1]) for index in sorted(here)])
            left.difference_update(here)
            for view in unit.views:
                if view.name in new:
                    view.write(new[view.name])
            shown.update()

        stream.walk(visit)
    remove_all(model, [(cuts[index][0], cuts[index][1]) for index in sorted(left)])


def refitted(w_OI: Tensor, hessian_II: Tensor, goal_II: Tensor, kept_K: Tensor, damp: float) -> Tensor:
    """Weights [O, K] on the kept inputs with the least mean squared error: argmin E‖W' x_K − W z‖² + λ‖W' − W_K‖².

    Args:
        hessian_II: E[x xᵀ] of what the layer reads.
        goal_II: E[z xᵀ], where W z is what it is to give (the Hessian itself where z = x).
        damp: λ as a share of the mean of the Hessian's kept diagonal.
    """
    start = w_OI[:, kept_K]
    own = hessian_II[kept_K][:, kept_K].double()
    gap = w_OI.double() @ goal_II[:, kept_K].double() - start.double() @ own
    factor = torch.linalg.cholesky(damped(own, damp))
    return (start + torch.cholesky_solve(gap.t(), factor).t()).float()
