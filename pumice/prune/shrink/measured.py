"""Statistics of units, and readers that make up for the units that go.

Shapes: U units of a group, m columns of a unit in its reader, O/I outputs and inputs of a reader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.progress import bar
from pumice.core.stream import Collect, Stream, Unit
from pumice.core.view import WeightView
from pumice.prune.shrink.base import Job, calibrated, note_singular
from pumice.prune.trace import Group


@dataclass
class Reader:
    """One weight that reads the units of a group: w_OI, its columns by unit, and the statistics of its inputs."""

    group: Group
    view: WeightView
    columns_Um: Tensor
    stats: dict[str, Tensor]

    def units(self, per_column: Tensor) -> Tensor:
        """Values of columns [I] as [U, m]."""
        return per_column[self.columns_Um]

    def columns(self, mask: Tensor) -> Tensor:
        """The columns that belong to the units of a mask [U]."""
        return self.columns_Um[mask].flatten()


def readers_of(model: nn.Module, groups: Sequence[Group]) -> dict[str, list[Reader]]:
    """The readers of every group, without statistics; PumiceError where a group has none that is a plain matrix."""
    found = {}
    for group in groups:
        views = group.views(model)
        found[group.name] = [Reader(group, view, columns, {}) for view, columns in views.values()]
        if not found[group.name]:
            raise PumiceError(f"group {group.name}: what reads its units is no plain matrix; take method 'width'.")
    return found


def measure(
    model: nn.Module,
    groups: Sequence[Group],
    job: Job,
    needs: frozenset[str],
    method: str,
    change: Callable[[Group, list[Reader]], None] | None = None,
) -> dict[str, list[Reader]]:
    """The statistics of every group's readers, by group name.

    The model runs block by block over the calibration data. `change(group, readers)`, if given, is called as soon as a
    group's readers are measured, in the order of execution; what it changes is what the blocks behind are measured on.

    Raises:
        PumiceError: no data, or a reader that no calibration data reach.
    """
    readers = readers_of(model, groups)
    by_view: dict[str, list[Reader]] = {}
    for found in readers.values():
        for reader in found:
            by_view.setdefault(reader.view.name, []).append(reader)
    views = list({found[0].view.name: found[0].view for found in by_view.values()}.values())
    stream = Stream(model, views, calibrated(method, job), compute=job.compute)
    singular: list[str] = []
    with bar(len(stream.units), f"shrink ({method})", enabled=job.progress, unit="block") as shown:

        def visit(unit: Unit, collect: Collect) -> None:
            for step in collect.steps() if change is not None else [unit.views]:
                for name, stats in collect(needs, step).items():
                    width = by_view[name][0].view.shape_OI[1]
                    singular.extend([name] if "hessian" in needs and collect.tokens[name] < width else [])
                    for reader in by_view[name]:
                        reader.stats = {key: value[0] for key, value in stats.items()}
                touched = {reader.group.name for view in step for reader in by_view[view.name]}
                for name in [name for name in readers if name in touched]:
                    if change is not None and all(reader.stats for reader in readers[name]):
                        change(readers[name][0].group, readers[name])
                        for reader in readers[name]:
                            # Hessians of all layers together would not fit beside a large model.
                            reader.stats = {}
            shown.update()

        stream.walk(visit)
    note_singular(job, singular)
    if change is None:
        blind = [r.view.name for found in readers.values() for r in found if not r.stats]
        if blind:
            raise PumiceError(
                f"data: the calibration data never reach layer {blind[0]}, which reads units to be judged."
            )
    return readers


def add_bias(view: WeightView, change_O: Tensor) -> None:
    """Add to the bias of a layer, giving it one if it has none."""
    module = view.module
    bias = getattr(module, "bias", None)
    if bias is None:
        module.register_parameter("bias", nn.Parameter(change_O.to(view.tensor), view.tensor.requires_grad))
    else:
        bias.data += change_O.to(bias)


def refit_kept(w_OI: Tensor, hessian_II: Tensor, kept: Tensor, lower: Tensor) -> Tensor:
    """The weights on the kept inputs that come nearest to all outputs, [O, kept].

    argmin ‖X W − X_K W'‖² has the closed form W' = W H[:, K] H[K, K]⁻¹; `lower` is the Cholesky factor of the damped
    H[K, K].
    """
    right = (w_OI @ hessian_II[:, kept]).mT
    return torch.cholesky_solve(right, lower).mT
