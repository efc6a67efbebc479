"""Token choice whose k grows during training.

Legend: T tokens, E experts, C columns of the routing.
"""

from __future__ import annotations

import math
from typing import Annotated

from torch import nn

from pumice.core.errors import PumiceError
from pumice.core.registry import assign
from pumice.moe.assign.token_choice import token_choice
from pumice.moe.plan import Plan
from pumice.moe.routing import RouteContext, Routing


@assign("growing", key="smoe-dropout", paper="arXiv:2303.01610", trains=True)
class Growing(nn.Module):
    """k rises in equal steps with `context.progress`, from `first` to `top_k`: SMoE-Dropout.

    A model trained so is self-slimmable: at any time `layer.assign.inference = k` says how many experts a token gets
    where nobody trains (`context.training` False); None is `top_k`. Without `context.progress` training is at `first`.
    O(T C). That k rises linearly is from memory, and so is the first k (the paper starts with part of the experts).
    """

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        top_k: Annotated[int | None, "experts of a token at the end; default all"] = None,
        first: Annotated[int, "experts of a token at the start"] = 1,
        inference: Annotated[int | None, "experts of a token in use; default top_k"] = None,
    ) -> None:
        super().__init__()
        self.top_k = experts if top_k is None else top_k
        self.first, self.inference = first, inference
        if not 1 <= first <= self.top_k <= experts:
            raise PumiceError(f"first={first} and top_k={self.top_k} must be 1 <= first <= top_k <= {experts} experts.")

    def k(self, context: RouteContext) -> int:
        """Experts of a token in this call."""
        if not context.training:
            return self.top_k if self.inference is None else self.inference
        done = min(max(context.progress or 0.0, 0.0), 1.0)
        return min(self.top_k, self.first + math.floor(done * (self.top_k - self.first + 1)))

    def forward(self, routing: Routing, context: RouteContext) -> Plan:
        return token_choice(routing, context, top_k=self.k(context))

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, first={self.first}, inference={self.inference}"
