"""DynMoE's gate: each expert has a learned threshold, and a token gets as many experts as pass theirs.

Legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core import select
from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing


@router("top_any", key="dynmoe", paper="arXiv:2405.14297", trains=True)
class TopAny(Router):
    """Expert e is active where sigmoid(cos(x, w_e)) > sigmoid(G_e); the active ones are averaged.

    Go with `assign="threshold"`. The step's gradient is passed straight through: 1 with respect to the margin of an
    active expert, 0 for an inactive one, as in the authors' code. A token that activates no expert gets none in
    training, where it is counted, and its best one in use. `pumice.moe.grow.tune(layer)` then removes experts that
    nobody activated and adds one for the tokens counted. The loss is `regularise · (‖Ŵ Ŵ^T - I‖_F + mean ‖w_e‖)`:
    different and simple experts. O(T D E).

    The scale on both arguments of the sigmoids is a constant 1 here, learned in some of the authors' versions.
    """

    missed_D: Tensor
    missed: Tensor

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        regularise: Annotated[float, "factor of the diversity and simplicity loss"] = 0.01,
    ) -> None:
        super().__init__(d_model, experts)
        self.regularise = regularise
        # Rows are orthogonal as long as there are at most D of them.
        self.weight_ED = nn.Parameter(nn.init.orthogonal_(torch.empty(experts, d_model)))
        self.threshold_E = nn.Parameter(torch.zeros(experts))
        self.register_buffer("missed_D", torch.zeros(d_model))
        self.register_buffer("missed", torch.zeros((), dtype=torch.int64))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        logits_TE = F.linear(F.normalize(x_TD, dim=1), F.normalize(self.weight_ED, dim=1))
        score_TE = logits_TE.sigmoid()
        margin_TE = F.relu(score_TE - self.threshold_E.sigmoid())
        active_TE = margin_TE > 0
        if context.training:
            self._count(x_TD, active_TE)
        else:
            active_TE = active_TE | (select.topk(score_TE.detach(), 1) & ~active_TE.any(1, keepdim=True))
        gate_TE = active_TE.to(margin_TE.dtype) + (margin_TE - margin_TE.detach())
        weight_TE = gate_TE / active_TE.sum(1, keepdim=True).clamp_min(1)
        losses = {"top_any": self.regularise * self.loss()} if context.training else {}
        return Routing(logits_TE, weight_TE, losses=losses)

    def loss(self) -> Tensor:
        """Distance of the experts' vectors from orthogonal, plus their mean length."""
        unit_ED = F.normalize(self.weight_ED, dim=1)
        eye_EE = torch.eye(self.experts, dtype=unit_ED.dtype, device=unit_ED.device)
        return (unit_ED @ unit_ED.t() - eye_EE).norm() + self.weight_ED.norm(dim=1).mean()

    @torch.no_grad()
    def _count(self, x_TD: Tensor, active_TE: Tensor) -> None:
        none_T = ~active_TE.any(1)
        self.missed += none_T.sum()
        self.missed_D += (x_TD * none_T[:, None]).sum(0)

    @torch.no_grad()
    def tuned(self, kept_N: Tensor) -> bool:
        """Keep the experts `kept_N`, and add one if tokens were missed; whether one was added. Counts start anew.

        The new expert's vector is the mean of the missed tokens and its threshold 0, as in the paper.
        """
        add = bool(self.missed > 0)
        weight_ED, threshold_E = self.weight_ED[kept_N], self.threshold_E[kept_N]
        if add:
            weight_ED = torch.cat([weight_ED, (self.missed_D / self.missed)[None]])
            threshold_E = torch.cat([threshold_E, threshold_E.new_zeros(1)])
        self.weight_ED, self.threshold_E = nn.Parameter(weight_ED), nn.Parameter(threshold_E)
        self.experts = weight_ED.shape[0]
        self.missed.zero_()
        self.missed_D.zero_()
        return add
