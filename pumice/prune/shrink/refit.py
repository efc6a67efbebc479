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
from pumice.prune.shrink.base import Job, note_singular
from pumice.prune.shrink.width_ls import greedy
from pumice.prune.trace import Group, remove, remove_all

REFITS = ("none", "layer", "dense")
CHOICES = ("activation", "obs")
DAMP = 0.01
Cuts = Sequence[tuple[Group, Tensor]]
"""Groups with the masks [U] of the units that stay."""


def check_refit(refit: str, choice: str = "activation") -> None:
    """PumiceError for an unknown value, or a choice that needs a refit and has none."""
    if refit not in REFITS:
        raise PumiceError(f"option refit={refit!r} is not known: use one of {', '.join(REFITS)}.")
    if choice not in CHOICES:
        raise PumiceError(f"option choice={choice!r} is not known: use one of {', '.join(CHOICES)}.")
    if choice == "obs" and refit == "none":
        raise PumiceError("choice='obs' counts on a refit of what stays: use it with refit='layer' or 'dense'.")


def cut(model: nn.Module, cuts: Cuts, batches: Sequence[Any], job: Job, refit: str, choice: str = "activation") -> None:
    """Remove units; what reads them is refitted as `refit` says.

    `layer`: each reader comes as near as it can to what it gave on the same inputs. `dense`: to what it gave in the dense
    model, on the inputs that the pruned blocks before it send; errors of earlier blocks are then made good as far as the
    layer can. `none`: no refit. With the choice `obs` the masks only say how many units stay; which, is decided block by
    block, as width-ls does it.
    """
    check_refit(refit, choice)
    if refit == "none":
        remove_all(model, list(cuts))
        return
    readers = {name: (index, *reader) for index, (g, _) in enumerate(cuts) for name, reader in g.views(model).items()}
    stream = Stream(
        model, [view for _, view, _ in readers.values()], batches, compute=job.compute, dense=refit == "dense"
    )
    needs = frozenset({"hessian", "drift"} if refit == "dense" else {"hessian"})
    left = dict(enumerate(cuts))
    singular: list[str] = []
    with bar(len(stream.units), "remove and refit", enabled=job.progress, unit="block") as shown:

        def visit(unit: Unit, collect: Collect) -> None:
            stats = collect(needs)
            for view in unit.views:
                index, _, columns_Um = readers[view.name]
                group, mask = left.pop(index, cuts[index])
                own = {key: value[0] for key, value in stats.get(view.name, {}).items()}
                w = view.read()
                if own and collect.tokens[view.name] < w.shape[1]:
                    singular.append(view.name)
                if own and choice == "obs":
                    mask = greedy(w, own["hessian"], columns_Um, int(mask.sum()), DAMP)
                kept = columns_Um[mask.cpu()].flatten().sort().values
                if own:
                    w = refitted(w, own["hessian"], own["hessian"] + own.get("drift", 0), kept, DAMP)
                remove(model, group, mask)
                view.write(w if own else w[:, kept])
            shown.update()

        stream.walk(visit)
    note_singular(job, singular)
    remove_all(model, list(left.values()))


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
