"""The dense model's outputs."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from pumice.core.linalg import damped
from pumice.core.registry import goal
from pumice.core.stats import Stats


@goal("dense", paper="arXiv:2504.02692", needs=("hessian", "drift"))
def dense(
    w_OI: Tensor,
    stats: Stats,
    *,
    share: Annotated[float, "share of the drift of the inputs that the weights make up for"] = 1.0,
    damp: Annotated[float, "share of the mean Hessian diagonal added to it"] = 0.01,
) -> Tensor:
    """What the layer gives in the dense model, on inputs that the pruned blocks before it have changed.

    min ‖W x_dense − W' x‖² over unconstrained W' is W + W D (H+λ)⁻¹ with H = E[x xᵀ], D = E[(x_dense − x) xᵀ]: these are the
    weights that scores and recovery then see, so that a layer also makes up for what was lost before it. The calibration
    objective of GPTAQ; the closed form, the share and the damping are ours.
    """
    missing = w_OI @ stats["drift"]
    return w_OI + share * torch.linalg.solve(damped(stats["hessian"], damp), missing, left=False)
