"""Least-squares refit of the kept weights."""

from __future__ import annotations

from typing import Annotated, Any

from torch import nn

from pumice.core.registry import repair
from pumice.prune.repair.again import solve_again
from pumice.prune.repair.base import Job


@repair("refit", paper="arXiv:2406.07831")
def refit(
    model: nn.Module,
    job: Job,
    *,
    share: Annotated[float, "share of what the layers before it changed that a layer makes up for (goal dense)"] = 0.5,
    sequential: Annotated[bool, "inside a block too, one layer after the other"] = True,
    damp: Annotated[float, "share of the mean Hessian diagonal added to it"] = 0.01,
    refine: Annotated[int, "steps of conjugate gradients"] = 40,
) -> dict[str, Any]:
    """Layer by layer, the kept weights that come nearest to the dense layer's outputs on calibration data.

    min ‖X(W−W')ᵀ‖² over W' with the zeros that are there, by conjugate gradients (the second half of ALPS), each layer
    fed by the refitted ones before it. What a repair before this one changed is lost: it starts from the dense weights.
    """
    goal: Any = {"name": "dense", "share": share} if share else "layer"
    recover = {"name": "alps", "damp": damp, "refine": refine}
    return solve_again(model, job, "refit", score="magnitude", recover=recover, goal=goal, sequential=sequential)
