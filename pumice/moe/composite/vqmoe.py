"""A discrete and a continuous path through the same experts: VQMoE.

Legend: T tokens, D model width.
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


@moe_layer("vqmoe", key="vqmoe", paper="arXiv:2411.19402")
class VQMoE(Layered):
    """y = g_c(x) · SMoE(x) + g_d(x) · LN(E_c(LN(q(x)))), where q(x) is the token's code and names the expert c.

    The first path is the MoE that the recipe describes, the second runs the same experts by router `quantised`, on the
    code instead of the token (straight-through gradient). g is a softmax of two linear scores. With `discrete` only the
    second path remains: the paper's fine-tuning, cheaper and without a router. One expert's work a token more than
    the MoE; O(T D C) for the codes.

    The norms and the gate follow the authors' code, whose mixing of token and code before the expert is left out.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        experts: int,
        moe: Mapping[str, Any] | None = None,
        *,
        codes: Annotated[int, "codes of each expert"] = 1,
        commit: Annotated[float, "weight of the commitment loss"] = 0.25,
        discrete: Annotated[bool, "leave out the continuous path"] = False,
    ) -> None:
        super().__init__()
        if codes < 1:
            raise PumiceError(f"codes={codes!r} of layer 'vqmoe' must be above 0.")
        self.only_discrete = discrete
        self.moe = MoE(d_model, d_ff, experts, **dict(moe or {}))
        router = {"name": "quantised", "codes": codes, "commit": commit}
        self.discrete = MoE(d_model, d_ff, self.moe.experts, router, top_k=1, shared=0, balance={})
        self.before, self.after = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.gate = nn.Linear(d_model, 2)

    def forward(self, x: Tensor, context: RouteContext | None = None) -> Tensor:
        given = context if context is not None else RouteContext.current() or RouteContext()
        known = given.for_layer(x.shape, self.discrete.experts, self.training, x.device)
        x_TD = x.reshape(-1, x.shape[-1])
        plan = self.discrete.route(x_TD, known)
        assert plan.routing is not None
        code_TD = plan.routing.cache["quantised_TD"].to(x.dtype)
        discrete = self.after(self.discrete.run(self.before(code_TD), plan)).view(x.shape)
        self.discrete.remember(plan)
        if self.only_discrete:
            return discrete
        gate = self.gate(x).softmax(-1)
        return gate[..., :1] * self.moe(x, given) + gate[..., 1:] * discrete
