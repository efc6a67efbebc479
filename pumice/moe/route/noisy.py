"""The router of the first sparsely gated layer: learned noise decides who is tried.

Legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing


@router("noisy", key="sparsely-gated-moe", paper="arXiv:1701.06538", chance=True)
class Noisy(Router):
    """softmax over the top-k of H = W_g x + N(0, 1) · softplus(W_noise x); both matrices start at zero.

    Noise only in training. The weights are softmax(H) renormalised over the selected experts, which is the softmax
    over the top-k. Its balance losses are `importance` and `smooth_load`; the latter reads the clean logits and the
    noise's standard deviation from the cache. With top_k 1 the weight is always 1 and only the losses reach the
    router. O(T D E).
    """

    def __init__(self, d_model: int, experts: int) -> None:
        super().__init__(d_model, experts)
        self.gate_ED = nn.Parameter(torch.zeros(experts, d_model))
        self.noise_ED = nn.Parameter(torch.zeros(experts, d_model))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        clean_TE = F.linear(x_TD, self.gate_ED)
        if not context.training:
            return Routing(clean_TE, clean_TE.softmax(1), renormalise=True)
        deviation_TE = F.softplus(F.linear(x_TD, self.noise_ED))
        noise_TE = torch.randn(
            clean_TE.shape, dtype=clean_TE.dtype, device=clean_TE.device, generator=context.generator
        )
        noisy_TE = clean_TE + noise_TE * deviation_TE
        cache = {"clean_TE": clean_TE, "deviation_TE": deviation_TE}
        return Routing(noisy_TE, noisy_TE.softmax(1), renormalise=True, cache=cache)
