"""GQSA's second stage: the scales alone, end to end."""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor, nn

from pumice.core.registry import repair
from pumice.prune.integers import tune_scales
from pumice.prune.repair.base import Job
from pumice.prune.repair.objective import Objective


@repair("oqp", key="gqsa", paper="arXiv:2412.17560", minutes=5.0, integers=True)
def oqp(
    model: nn.Module,
    job: Job,
    *,
    steps: Annotated[int, "optimizer steps, one batch each"] = 192,
    lr: Annotated[float, "relative step of the scales"] = 1e-3,
    distil: Annotated[float, "weight of the divergence from the dense model, where it is given, beside the loss"] = 1.0,
) -> dict[str, Any]:
    """Train the scales of integer layers end to end while the integers stand still (GQSA, stage 2).

    End-to-end optimisation of the quantisation parameters. Zero points stand too: they are integers here. From the
    catalogue's description of the paper, not from its code.
    """
    target = Objective(model, job, distil)

    def objective(batch: Any) -> Tensor:
        with job.precision():
            return target(batch)

    minutes = None if job.clock.minutes is None else max(job.clock.minutes * (1 - job.clock.used), 0.001)
    return tune_scales(model, job.views, job.batches, objective, steps=steps, lr=lr, minutes=minutes, seed=job.seed)
