"""Width pruning with least-squares compensation: what stays takes over from what goes.

Shapes: U units, m columns of a unit in its reader, O/I outputs and inputs of the reader.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor, nn

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.linalg import damped, damped_cholesky, damped_inverse
from pumice.core.registry import shrink
from pumice.prune.shrink.base import MULTIPLE, Job, block_parameters, inner_groups
from pumice.prune.shrink.budget import uniform
from pumice.prune.shrink.depth import depth
from pumice.prune.shrink.measured import Reader, measure, refit_kept
from pumice.prune.trace import Group, remove_all

CHOICES = ("obs", "contribution", "activation")
TRIALS = 4
"""Calibration windows on which the loss without a block is measured."""


@shrink("width-ls", paper="arXiv:2407.14679", needs=("hessian",))
def width_ls(
    model: nn.Module,
    job: Job,
    *,
    heads: Annotated[bool, "remove heads and KV groups as well as channels"] = False,
    choice: Annotated[str, "obs (cheapest to replace, one by one), contribution (E[x²]·‖W‖²) or activation (E[x²])"] = (
        "obs"
    ),
    damp: Annotated[float, "added to the Hessian's diagonal, as a share of its mean"] = 0.01,
    multiple: Annotated[int, "channels are kept in multiples of this"] = MULTIPLE,
    blocks: Annotated[float, "share of what is to go that goes as whole blocks first, by the loss without them"] = 0.0,
) -> nn.Module:
    """Remove units by what their readers lose, and refit each reader on the units that stay by least squares.

    With H = E[x xᵀ] of a reader's inputs and K the inputs that stay, the refit W' = W H[:, K] H[K, K]⁻¹ gives the outputs
    that come nearest to those before, ‖XW − X_K W'‖². Blocks are changed one after the other, each measured on what the
    changed ones before it give; every layer keeps the same share of its units, so that an ordinary checkpoint is left.

    `activation` is the score of Minitron (the paper: activation-based width pruning; it then retrains by distillation,
    which is not done here). `obs` removes one unit after the other, always the one whose loss after the best compensation,
    tr(W_u (H⁻¹_uu)⁻¹ W_uᵀ), is smallest, as structured OBS does (ZipLM, arXiv:2302.04089). Written from the formulas.

    `blocks` above 0 removes whole blocks first, as `depth` with `by="loss"` does on four windows: a block less saves the
    time of its operators as well as its bytes.

    Raises:
        PumiceError: an unknown choice, a share of blocks outside [0, 1), or no calibration data.
    """
    if choice not in CHOICES:
        raise PumiceError(f"choice={choice!r} is unknown: write one of {', '.join(CHOICES)}.")
    if not 0 <= blocks < 1:
        raise PumiceError(f"blocks={blocks:g} must be at least 0 and below 1: the share that goes as whole blocks.")
    if blocks and job.density < 1:
        wanted = job.density * block_parameters(model)
        depth(model, replace(job, density=1 - blocks * (1 - job.density)), by="loss", samples=TRIALS)
        job = replace(job, density=min(1.0, wanted / block_parameters(model)))
    groups = inner_groups(model, job, ("channel", "head") if heads else ("channel",))
    kept = dict(zip((group.name for group in groups), uniform(model, groups, job, multiple), strict=True))

    def change(group: Group, readers: list[Reader]) -> None:
        if kept[group.name] < group.units:
            keep = order(readers, kept[group.name], choice, damp)
            for reader in readers:
                compensate(reader, keep, damp)
            remove_all(model, [(group, keep)])

    measure(model, groups, job, frozenset(("hessian",)), "width-ls", change)
    return model


def order(readers: list[Reader], keep: int, choice: str, damp: float) -> Tensor:
    """The units that stay, as a mask [U]."""
    if choice == "obs":
        # Several readers of the same units read the same activations; their rows are one taller matrix.
        first = readers[0]
        same = [one for one in readers if torch.equal(one.columns_Um, first.columns_Um)]
        return greedy(
            torch.cat([one.view.read() for one in same]), first.stats["hessian"], first.columns_Um, keep, damp
        )
    scores = []
    for reader in readers:
        energy = torch.diagonal(reader.stats["hessian"])
        weight = reader.view.read().square().sum(0) if choice == "contribution" else 1.0
        scores.append(reader.units(energy * weight).mean(1))
    return select.topk(torch.stack(scores).sum(0), keep)


def greedy(w_OI: Tensor, hessian_II: Tensor, columns_Um: Tensor, keep: int, damp: float) -> Tensor:
    """Remove units one by one, each time the one whose best compensation leaves the least error; a mask [U].

    Removing unit u costs tr(W_u (H⁻¹_uu)⁻¹ W_uᵀ); then W and H⁻¹ are updated as in the optimal brain surgeon, so that the
    costs of the others stay exact.
    """
    # Inputs that are always zero cost nothing, whatever the damping makes of them.
    weight = w_OI * (torch.diagonal(hessian_II) > 0)
    inverse, _ = damped_inverse(hessian_II, damp)
    alive = torch.ones(len(columns_Um), dtype=torch.bool, device=weight.device)
    for _ in range(len(columns_Um) - keep):
        blocks_Umm = inverse[columns_Um[:, :, None], columns_Um[:, None, :]]
        parts_UmO = weight.t()[columns_Um]
        costs = _costs(blocks_Umm, parts_UmO).masked_fill(~alive, torch.inf)
        unit = int(costs.argmin())
        alive[unit] = False
        columns = columns_Um[unit]
        own = torch.linalg.solve(blocks_Umm[unit], inverse[columns])
        weight -= weight[:, columns] @ own
        inverse -= inverse[:, columns] @ own
        # What is gone has no cost and is not touched again; exact zeros would make its block singular.
        weight[:, columns] = 0
        inverse[columns] = 0
        inverse[:, columns] = 0
        inverse[columns, columns] = 1
    return alive.cpu()


def _costs(blocks_Umm: Tensor, parts_UmO: Tensor) -> Tensor:
    if blocks_Umm.shape[-1] == 1:
        return parts_UmO[:, 0].square().sum(1) / blocks_Umm[:, 0, 0].clamp(min=1e-30)
    return (parts_UmO * torch.linalg.solve(blocks_Umm, parts_UmO)).sum((1, 2))


def compensate(reader: Reader, keep: Tensor, damp: float) -> None:
    """Refit a reader on the inputs that stay, in place; the columns of the others are left to be removed."""
    hessian = damped(reader.stats["hessian"], damp)
    gone = torch.zeros(len(hessian), dtype=torch.bool)
    gone[reader.columns(~keep)] = True
    stay = torch.nonzero(~gone).flatten().to(hessian.device)
    weight = reader.view.read()
    lower, _ = damped_cholesky(hessian[stay][:, stay], 0.0)
    weight[:, stay] = refit_kept(weight, hessian, stay, lower)
    reader.view.write(weight)
