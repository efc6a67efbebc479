"""SAM: first a group of experts, then experts of that group.

Legend: T tokens, D model width, E experts, G groups (of E / G experts, side by side).
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing


@router("sam", key="sam", paper="arXiv:2110.07431", forbids=True)
class SwitchAndMixture(Router):
    """A switch router picks one group, a mixture router scores the experts; a token only gets experts of its group.

    With a group a device, k experts cost one exchange. The weight of an expert is the switch's probability of its group
    times its softmax within the group, so that both routers learn from the output; experts of other groups are not
    allowed. Losses: the load balance between groups (`balance · G Σ_g f_g P_g`; the one between experts is the layer's
    own), and an alignment, `align · KL(switch ‖ mixture's mass of each group)`, which is 0 when the group that is
    chosen is the one whose experts score best. top_k may be up to E / G. O(T D (E + G)).

    From memory: that an alignment loss exists; its form here, and the product as the weight, are ours.
    """

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        groups: Annotated[int, "groups of equally many experts"] = 2,
        balance: Annotated[float, "factor of the balance between groups"] = 0.01,
        align: Annotated[float, "factor of the alignment of both routers"] = 0.01,
    ) -> None:
        super().__init__(d_model, experts)
        if groups < 1 or experts % groups:
            raise PumiceError(f"groups={groups} with experts={experts}: the groups must be equally large.")
        self.groups, self.balance, self.align = groups, balance, align
        self.group_GD = nn.Parameter(nn.init.trunc_normal_(torch.empty(groups, d_model), std=d_model**-0.5))
        self.expert_ED = nn.Parameter(nn.init.trunc_normal_(torch.empty(experts, d_model), std=d_model**-0.5))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        switch_TG = F.linear(x_TD, self.group_GD).log_softmax(1)
        logits_TE = F.linear(x_TD, self.expert_ED)
        logits_TGN = logits_TE.view(-1, self.groups, self.experts // self.groups)
        weight_TE = (switch_TG.exp()[:, :, None] * logits_TGN.softmax(2)).flatten(1)
        chosen_TG = select.topk(switch_TG.detach(), 1)
        losses = {}
        if context.training and x_TD.shape[0]:
            share_G = chosen_TG.to(weight_TE.dtype).mean(0)
            losses["sam_balance"] = self.balance * self.groups * (share_G * switch_TG.exp().mean(0)).sum()
            mixture_TG = logits_TE.log_softmax(1).view(logits_TGN.shape).logsumexp(2)
            divergence_T = (switch_TG.exp() * (switch_TG - mixture_TG)).sum(1)
            losses["sam_align"] = self.align * divergence_T.mean()
        allowed_TE = chosen_TG.repeat_interleave(self.experts // self.groups, 1)
        return Routing(logits_TE, weight_TE, allowed_TE=allowed_TE, losses=losses)
