"""GQSA's first stage: integers and scales of one block after the other."""

from __future__ import annotations

from typing import Annotated, Any

from torch import nn

from pumice.core.registry import repair
from pumice.prune.integers import tune_blocks
from pumice.prune.repair.base import Job


@repair("bqpo", key="gqsa", paper="arXiv:2412.17560", minutes=5.0, integers=True)
def bqpo(
    model: nn.Module,
    job: Job,
    *,
    steps: Annotated[int, "optimizer steps for each block, one batch each"] = 96,
    lr_levels: Annotated[float, "step of the integers, as a share of their range"] = 0.002,
    lr_scales: Annotated[float, "relative step of the scales"] = 1e-3,
    free: Annotated[bool, "a weight that was rounded to zero inside a stored group may move again"] = True,
) -> dict[str, Any]:
    """Tune the integers and scales of each block until it gives what the dense model's block gives (GQSA, stage 1).

    Block quantisation-pruning optimisation: needs the dense model and layers of integers; which groups are missing does
    not change. From the catalogue's description of the paper, not from its code.
    """
    teacher = job.need_teacher("bqpo")
    minutes = None if job.clock.minutes is None else max(job.clock.minutes * (1 - job.clock.used), 0.001)
    return tune_blocks(
        model,
        teacher,
        job.views,
        job.batches,
        steps=steps,
        lr_levels=lr_levels,
        lr_scales=lr_scales,
        free=free,
        minutes=minutes,
        seed=job.seed,
        progress=job.progress,
        compute=job.compute,
    )
