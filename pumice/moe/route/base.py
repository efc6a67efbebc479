"""What every router is: a module from tokens to a `Routing`.

Legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pumice.moe.plan import BasePlan
from pumice.moe.routing import RouteContext, Routing


class Router(nn.Module):
    """Base of routers: `Router(d_model, experts, *, option=…)`, `forward(x_TD, context) -> Routing`.

    A router computes in float32 inside models of half precision: its parameters stay float32 when the model is
    converted, and the layer hands it tokens of that dtype.
    """

    def __init__(self, d_model: int, experts: int) -> None:
        super().__init__()
        self.d_model, self.experts = d_model, experts

    @property
    def dtype(self) -> torch.dtype:
        """What tokens are converted to for this router."""
        own = chain(self.parameters(), self.buffers())
        return next((one.dtype for one in own if one.is_floating_point()), torch.float32)

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        raise NotImplementedError

    def observe(self, plan: BasePlan) -> None:
        """What became of the routing: the layer calls this in training, for routers that learn from loads."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            lowered = tensor.dtype is torch.float32 and out.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(out.device) if lowered else out

        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, experts={self.experts}"


def gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise in the shape of `like`: the argmax of logits plus it is a sample of their softmax."""
    return -torch.empty_like(like).exponential_(generator=generator).log()
