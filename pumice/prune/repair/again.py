"""Solving the layers once more, from the dense weights, on a mask that is there already."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.stream import Unit
from pumice.prune.axes import Axes
from pumice.prune.repair.base import Job
from pumice.prune.run import LayerResult, Pruner
from pumice.weights.patterns.base import parse

KNOWN_PATTERNS = ("1:4", "2:4", "2:8", "4:8")


class _TimeIsUp(Exception):
    pass


def solve_again(model: nn.Module, job: Job, method: str, **axes: Any) -> dict[str, Any]:
    """Walk the model block by block and let a recovery find the weights on the masks, starting from the dense weights.

    Each block reads what the blocks solved before it give. When the clock runs out, the rest keep what they had.

    Args:
        axes: as `Axes.make` takes them; the score only matters where the recovery moves the mask.

    Returns:
        layers solved and the layers that there are.
    """
    pairs = job.teacher_views(method)
    before: dict[str, Tensor] = {view.name: view.matrix().clone() for view, _ in pairs}
    masks = {name: w != 0 for name, w in before.items()}
    # Every layer keeps its own density; the axes only need one where no N:M pattern gives it.
    fixed = axes.get("pattern", "unstructured") != "unstructured"
    made = Axes.make(**axes, density=None if fixed else 0.5)
    done: set[str] = set()

    def finished(unit: Unit, results: list[LayerResult]) -> None:
        del unit
        done.update(result.name for result in results)
        if job.clock.used >= 1:
            raise _TimeIsUp

    densities = {name: float(mask.float().mean()) for name, mask in masks.items()}
    options: dict[str, Any] = {"compute": job.compute, "progress": job.progress, "finished": finished}
    pruner = Pruner(model, made, job.batches, densities=densities, masks=masks, **options)
    pruner.views = [view for view in pruner.views if view.name in before]
    for view, dense in pairs:
        view.write(dense.matrix().float())
    try:
        job.notes += pruner.run().notes
    except _TimeIsUp:
        if len(done) < len(pairs):
            job.notes.append(
                f"the time was up after {len(done)} of {len(pairs)} layers; the others were left as they were"
            )
    finally:
        for view, _ in pairs:
            if view.name not in done:
                view.write(before[view.name].float())
    return {"layers": len(pairs), "solved": len(done)}


def pattern_of(job: Job) -> str:
    """The N:M pattern that every pruned layer obeys, or "unstructured"."""
    for text in KNOWN_PATTERNS:
        pattern = parse(text)
        fits = True
        for view in job.views:
            mask = view.matrix() != 0
            try:
                pattern.check_shape(view.module_name, *view.shape_OI, pattern.density(None))
            except PumiceError:
                fits = False
                break
            # A layer that is sparser than the pattern would fit anything.
            if not pattern.verify(mask) or abs(float(mask.float().mean()) - pattern.density(None)) > 0.02:
                fits = False
                break
        if fits:
            return text
    return "unstructured"
