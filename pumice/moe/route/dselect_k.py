"""DSelect-k: a smooth gate that ends at exactly k experts.

Legend: T tokens, D model width, E experts, K selectors, B bits of an expert's number.
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


def smooth_step(t: Tensor, gamma: float) -> Tensor:
    """0 below -gamma/2, 1 above gamma/2, between them the cubic that joins both with slope 0."""
    inner = t.clamp(-gamma / 2, gamma / 2) / gamma
    middle = inner * (1.5 - 2 * inner.square()) + 0.5
    # The cubic of a rounded border is not exactly 0 or 1, and the selection rests on exact zeros.
    return torch.where(t <= -gamma / 2, torch.zeros_like(t), torch.where(t >= gamma / 2, torch.ones_like(t), middle))


def mean_entropy(share_TKE: Tensor) -> Tensor:
    """Mean over tokens of the summed entropy of K distributions over E."""
    return entropy(share_TKE).sum((1, 2)).mean()


def entropy(share: Tensor) -> Tensor:
    """-p log p, with a finite slope at 0, where smooth steps end: an infinite one times their slope of 0 is NaN."""
    return -share * (share + 1e-6).log()


@router("dselect_k", key="dselect-k", paper="arXiv:2106.03760")
class DSelectK(Router):
    """Σ_k softmax(α)_k r(z_k): k selectors, each of which writes the number of an expert in smooth bits.

    r(z)_e is the product over bits of S(z_b) or 1 - S(z_b), S the smooth-step function. Its weights sum to 1 and become
    exactly 0 when bits saturate: the entropy term `entropy · mean_t Σ_k H(r(z_k))` drives every selector to one expert,
    so that a trained gate has at most k of them. Go with `assign="threshold"`. Two selectors may agree on an expert.
    z and α are linear in the token, or constants with `static` (the paper's gate for a task).

    Where E is no power of two some codes stand for no expert; `reach · mean_t Σ_k (1 / Σ_e r(z_k)_e - 1)` keeps
    selectors off them, as in the authors' code (which has a factor of 1). Initial values are the authors': uniform
    within γ/100 for z, 0.05 for α; their weight of the entropy is a schedule to be tuned. O(T k (D log E + E log E)).
    """

    code_EB: Tensor

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        top_k: Annotated[int, "selectors, the most experts of a token once trained"] = 2,
        gamma: Annotated[float, "width of the smooth step"] = 1.0,
        entropy: Annotated[float, "factor of the entropy term"] = 0.01,
        reach: Annotated[float, "factor of the term against codes of no expert"] = 0.01,
        static: Annotated[bool, "the same experts for all tokens"] = False,
    ) -> None:
        super().__init__(d_model, experts)
        if top_k < 1 or gamma <= 0:
            raise PumiceError(f"top_k={top_k} must be at least 1 and gamma={gamma} above 0.")
        self.top_k, self.gamma, self.entropy, self.reach, self.static = top_k, gamma, entropy, reach, static
        bits = (experts - 1).bit_length()
        number_E1 = torch.arange(experts)[:, None]
        self.register_buffer("code_EB", (number_E1 >> torch.arange(bits)) & 1 == 1, persistent=False)
        edge = gamma / 100
        self.bit_bias_KB = nn.Parameter(torch.empty(top_k, bits).uniform_(-edge, edge))
        self.share_bias_K = nn.Parameter(torch.empty(top_k).uniform_(-0.05, 0.05))
        if not static:
            self.bit_KBD = nn.Parameter(torch.empty(top_k, bits, d_model).uniform_(-edge, edge))
            self.share_KD = nn.Parameter(torch.empty(top_k, d_model).uniform_(-0.05, 0.05))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        select_TKE, share_TK = self.selectors(x_TD)
        weight_TE = torch.einsum("tk,tke->te", share_TK, select_TKE)
        losses = {}
        if context.training and x_TD.shape[0]:
            losses["dselect_k"] = self.entropy * mean_entropy(select_TKE)
            if self.experts < 2 ** self.code_EB.shape[1]:
                reached_TK = select_TKE.sum(2).clamp_min(1e-6)
                losses["dselect_k_reach"] = self.reach * (1 / reached_TK - 1).sum(1).mean()
        return Routing(weight_TE, weight_TE, losses=losses)

    def selectors(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """r [T, K, E] and the selectors' shares [T, K]."""
        tokens = x_TD.shape[0]
        bit_TKB, share_TK = self.bit_bias_KB.expand(tokens, -1, -1), self.share_bias_K.expand(tokens, -1)
        if not self.static:
            bit_TKB = bit_TKB + torch.einsum("td,kbd->tkb", x_TD, self.bit_KBD)
            share_TK = share_TK + F.linear(x_TD, self.share_KD)
        step_TKB = smooth_step(bit_TKB, self.gamma)
        factor_TKEB = torch.where(self.code_EB, step_TKB[:, :, None], 1 - step_TKB[:, :, None])
        return factor_TKEB.prod(3), share_TK.softmax(1)
