"""Something of the token's own in front of merged experts: the token-level variant of MEO.

Legend: D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.registry import moe_layer
from pumice.moe.composite.base import Layered
from pumice.moe.layer import MoE
from pumice.moe.routing import RouteContext


@moe_layer("token_attention", key="meo", paper="arXiv:2310.09832")
class TokenAttention(Layered):
    """MoE(x + W_up relu(W_down x)): a narrow block tells the tokens of a sequence apart that share one merged expert.

    W_up starts at zero, so that the layer starts as the MoE alone. The experts are merged once a sequence (assign
    `merge`); the block costs 2 · D² / reduce multiply-adds a token. Width and initialisation follow the authors' code.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        experts: int,
        moe: Mapping[str, Any] | None = None,
        *,
        reduce: Annotated[int, "d_model over the width of the block"] = 16,
    ) -> None:
        super().__init__()
        if reduce < 1:
            raise PumiceError(f"reduce={reduce!r} of layer 'token_attention' must be above 0.")
        self.down = nn.Linear(d_model, max(1, d_model // reduce))
        self.up = nn.Linear(self.down.out_features, d_model)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.moe = MoE(d_model, d_ff, experts, **dict(moe or {}))

    def forward(self, x: Tensor, context: RouteContext | None = None) -> Tensor:
        return self.moe(x + self.up(self.down(x).relu()), context)
