"""Every token is cut into sub-tokens that are routed on their own: MH-MoE.

Legend: B batch, S sequence, D model width, H heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.registry import moe_layer
from pumice.moe.composite.base import Layered
from pumice.moe.layer import MoE
from pumice.moe.routing import TOKEN_FIELDS, RouteContext


@moe_layer("multi_head", key="mh-moe", paper="arXiv:2404.15045")
class MultiHead(Layered):
    """y = W_merge [MoE(s_1); …; MoE(s_H)] where s_1 … s_H are the pieces of W_split x, each routed for itself.

    Experts have width D / H, so that a token reaches up to H · top_k of them. With one head it is a MoE between two
    linear maps. Everything but the two maps (with bias, Xavier initialisation) is the MoE's. The MoE's work for
    tokens of width D / H, H times as many, plus O(T D²).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        experts: int,
        moe: Mapping[str, Any] | None = None,
        *,
        heads: Annotated[int, "sub-tokens of a token"] = 4,
    ) -> None:
        super().__init__()
        if heads < 1 or d_model % heads:
            raise PumiceError(f"heads={heads!r} of layer 'multi_head' must divide d_model={d_model}.")
        self.heads = heads
        self.split, self.merge = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        for linear in (self.split, self.merge):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.moe = MoE(d_model // heads, d_ff, experts, **dict(moe or {}))

    def forward(self, x: Tensor, context: RouteContext | None = None) -> Tensor:
        given = context if context is not None else RouteContext.current() or RouteContext()
        # The pieces of a token stand side by side in its sequence, and share what is known of it.
        flat = {name: getattr(given, name) for name in TOKEN_FIELDS}
        flat = {
            name: value.reshape(-1).repeat_interleave(self.heads) for name, value in flat.items() if value is not None
        }
        pieces = self.split(x).unflatten(-1, (self.heads, -1)).flatten(-3, -2)
        y = self.moe(pieces, dataclasses.replace(given, **flat))
        return self.merge(y.reshape(x.shape))
