"""Tokens pass through one to several experts, one of a later stratum each time: Stratified MoE.

Legend: T tokens, D model width, E experts, N tokens that are at a stratum, L strata.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.core.registry import moe_layer
from pumice.moe.composite.base import Layered
from pumice.moe.layer import MoE
from pumice.moe.plan import Plan
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing


class Gate(Router):
    """softmax(W x) over the experts from number `first` on; the others are forbidden."""

    def __init__(self, d_model: int, experts: int, first: int) -> None:
        super().__init__(d_model, experts)
        self.first = first
        self.weight_ED = nn.Parameter(torch.empty(experts - first, d_model))
        nn.init.trunc_normal_(self.weight_ED, std=(0.1 / d_model) ** 0.5)

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        logits_TE = F.pad(F.linear(x_TD, self.weight_ED), (self.first, 0), value=-torch.inf)
        allowed_TE = torch.arange(self.experts, device=x_TD.device).expand_as(logits_TE) >= self.first
        return Routing(logits_TE, logits_TE.softmax(1), allowed_TE=allowed_TE)


@moe_layer("stratified", key="stratified-moe", paper="arXiv:2305.02176")
class Stratified(Layered):
    """A token's first gate sends it to an expert of any stratum; after one of stratum j it goes on to gate j + 1.

    The experts, one pool, are L strata of E / L. A gate sees the experts of its own and of later strata and takes one;
    the token is done after an expert of the last stratum, so that it gets between 1 and L experts, as many as the gates
    decide (`experts_T`). Each result is added to the token, which is normalised before every gate but the first; what
    is returned is the sum of what was added, so that one stratum is an ordinary top-1 MoE layer. Each gate has its own
    balance loss. At most L experts' work a token, and O(T L D E) for the gates.

    The paper also has top-2 gates, and where exactly it normalises is from memory.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        experts: int,
        moe: Mapping[str, Any] | None = None,
        *,
        strata: Annotated[int, "of equally many experts"] = 2,
    ) -> None:
        super().__init__()
        if strata < 1 or experts % strata:
            raise PumiceError(f"strata={strata!r} of layer 'stratified' must divide the {experts} experts.")
        given = {"kind": "mlp", "shared": 0, **dict(moe or {})}
        for name, allowed in (
            ("router", ("linear",)),
            ("assign", ("token_choice",)),
            ("top_k", (1,)),
            ("shared", (0,)),
        ):
            if given.pop(name, allowed[0]) not in allowed:
                raise PumiceError(f"{name} of layer 'stratified' is its own: leave it out.")
        pool = registry.experts.bind(given.pop("kind"))(d_model, d_ff, experts)
        self.each, self.strata = experts // strata, strata
        self.stages = nn.ModuleList(
            MoE(d_model, d_ff, pool, Gate(d_model, experts, one * self.each), top_k=1, shared=0, **given)
            for one in range(strata)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(strata - 1))
        self.experts_T: Tensor | None = None

    def forward(self, x: Tensor, context: RouteContext | None = None) -> Tensor:
        given = context if context is not None else RouteContext.current() or RouteContext()
        whole = given.for_layer(x.shape, None, self.training, x.device)
        h_TD = x.reshape(-1, x.shape[-1])
        first_TD, next_T = h_TD, torch.zeros(h_TD.shape[0], dtype=torch.int64, device=x.device)
        self.experts_T = torch.zeros_like(next_T)
        for stratum, stage in enumerate(self.stages):
            here_N = (next_T == stratum).nonzero().flatten()
            h_ND = h_TD[here_N]
            y_ND = stage(h_ND if stratum == 0 else self.norms[stratum - 1](h_ND), whole.part(here_N))
            plan = stage.plan
            assert isinstance(plan, Plan)
            h_TD = h_TD.index_add(0, here_N, y_ND)
            # What a capacity refused stays at this stratum's end and tries the next gate.
            went_N = torch.full_like(here_N, stratum).index_put((plan.token_A,), plan.expert_A // self.each)
            next_T = next_T.index_put((here_N,), went_N + 1)
            self.experts_T[here_N[plan.token_A]] += 1
        return (h_TD - first_TD).view(x.shape)
