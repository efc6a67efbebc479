"""Tokens decide together: the router's logits are averaged over similar or attended tokens.

Legend: T tokens, D model width, E experts, B batch, S positions, H heads, Q/K positions.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing


class _Mixed(Router):
    """softmax(M W x), where a subclass says what mixes: M x as `mix(x_TD, logits_TE, context)`."""

    def __init__(self, d_model: int, experts: int, renormalise: bool) -> None:
        super().__init__(d_model, experts)
        self.renormalise = renormalise
        self.weight_ED = nn.Parameter(torch.empty(experts, d_model))
        nn.init.trunc_normal_(self.weight_ED, std=(0.1 / d_model) ** 0.5)

    def mix(self, x_TD: Tensor, logits_TE: Tensor, context: RouteContext) -> Tensor:
        raise NotImplementedError

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        logits_TE = self.mix(x_TD, F.linear(x_TD, self.weight_ED), context)
        return Routing(logits_TE, logits_TE.softmax(1), renormalise=self.renormalise)


@router("similarity", key="similarity-attention-aware-smoe", paper="arXiv:2505.00792", causal=False)
class Similarity(_Mixed):
    """Logits are Σ_j S_ij W x_j with S = softmax_j(x_i·x_j / (τ √D)) over the tokens of the same sequence.

    Similar tokens thus get similar experts, and noise on one token flips its choice less often. τ towards 0 is the
    plain router where a token is most similar to itself. Needs [S, S] numbers a sequence: O(T S (D + E)). Not causal
    unless `causal` is set, which leaves out later tokens.

    That logits are mixed rather than probabilities, and the scaled product as similarity, are from memory.
    """

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        temperature: Annotated[float, "τ, above 0: small is closer to the plain router"] = 1.0,
        causal: Annotated[bool, "only earlier tokens count"] = False,
        renormalise: Annotated[bool, "divide a token's selected weights by their sum"] = False,
    ) -> None:
        super().__init__(d_model, experts, renormalise)
        if temperature <= 0:
            raise PumiceError(f"temperature={temperature!r} of router 'similarity' must be above 0.")
        self.temperature, self.only_earlier = temperature, causal

    def mix(self, x_TD: Tensor, logits_TE: Tensor, context: RouteContext) -> Tensor:
        batch, segment_T = 1, context.segment_T
        if context.batch and context.seqlen is not None and context.batch * context.seqlen == x_TD.shape[0]:
            batch, segment_T = context.batch, None
        length = x_TD.shape[0] // batch
        x_BSD = x_TD.view(batch, length, self.d_model)
        logits_BSE = logits_TE.view(batch, length, self.experts)
        similar_BSS = x_BSD @ x_BSD.transpose(1, 2) / (self.temperature * self.d_model**0.5)
        place_S = torch.arange(length, device=x_TD.device)
        if segment_T is not None and segment_T.shape[0] == x_TD.shape[0]:
            similar_BSS = similar_BSS.masked_fill(segment_T[:, None] != segment_T, -torch.inf)
        if self.only_earlier:
            similar_BSS = similar_BSS.masked_fill(place_S > place_S[:, None], -torch.inf)
        return (similar_BSS.softmax(2) @ logits_BSE).flatten(0, 1)


@router(
    "attention",
    key="similarity-attention-aware-smoe",
    paper="arXiv:2505.00792",
    needs=("attention_BHQK",),
    causal=False,
)
class Attention(_Mixed):
    """Logits are Σ_j A_ij W x_j with A the attention probabilities in front of the layer, averaged over the heads.

    As causal as the attention. O(T S (H + E)).

    Raises:
        PumiceError: attention of another number of tokens.
    """

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        renormalise: Annotated[bool, "divide a token's selected weights by their sum"] = False,
    ) -> None:
        super().__init__(d_model, experts, renormalise)

    def mix(self, x_TD: Tensor, logits_TE: Tensor, context: RouteContext) -> Tensor:
        attention_BHQK = context.need("attention_BHQK", "router 'attention'")
        batch, _, queries, keys = attention_BHQK.shape
        if batch * queries != x_TD.shape[0] or queries != keys:
            raise PumiceError(
                f"context.attention_BHQK is {tuple(attention_BHQK.shape)} for {x_TD.shape[0]} tokens: router 'attention' "
                "needs [B, H, S, S] with B · S tokens."
            )
        mean_BQK = attention_BHQK.to(logits_TE.dtype).mean(1)
        return (mean_BQK @ logits_TE.view(batch, keys, self.experts)).flatten(0, 1)
