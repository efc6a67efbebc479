"""No router: every expert looks at every token a little, and those that react most go on.

Legend: T tokens, D model width, E experts, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.core.errors import PumiceError
from pumice.core.registry import router
from pumice.moe.experts.autonomous import Autonomous
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing


@router("autonomy", key="autonomy-of-experts", paper="arXiv:2501.13074", gradient="none", kind="autonomous")
class Autonomy(Router):
    """An expert's logit is the L2 norm of its own low-rank product A_e x; weights are the softmax of the chosen norms.

    Has no parameters: gradients reach the experts' A through the weights. The products [T, E, R] stay in the cache,
    where kind `autonomous` takes up those of the chosen experts instead of multiplying again. O(T E R D), which the
    experts have to do anyway for the chosen ones. A router of the mean of a segment leaves no products of tokens, and
    the experts then make their own.

    The experts' products are made in the experts' precision, the norms in float32.
    """

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        experts = context.need("experts", "router 'autonomy'")
        if not isinstance(experts, Autonomous):
            raise PumiceError(f"experts of {type(experts).__name__} with router='autonomy': use kind='autonomous'.")
        low_TER = experts.low(x_TD.to(experts.low_proj.dtype))
        norm_TE = torch.linalg.vector_norm(low_TER.to(x_TD.dtype), dim=2)
        return Routing(norm_TE, norm_TE.softmax(1), renormalise=True, cache={"low_TER": low_TER})
