"""DeepSeek's routers: groups of experts, and a bias that balances without a loss.

Legend: T tokens, D model width, E experts, G groups, N experts of a group.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import router
from pumice.moe.plan import BasePlan
from pumice.moe.route.base import Router
from pumice.moe.route.linear import GATES
from pumice.moe.routing import RouteContext, Routing


def allowed_groups(score_TE: Tensor, groups: int, kept: int, best: int) -> Tensor:
    """allowed_TE: the `kept` groups of experts whose `best` best scores have the largest sum."""
    score_TGN = score_TE.unflatten(1, (groups, -1))
    value_TG = select.largest(score_TGN, min(best, score_TGN.shape[2]))[0].sum(2)
    return select.topk(value_TG, kept)[:, :, None].expand_as(score_TGN).flatten(1)


@router(
    "deepseek",
    key="deepseekmoe",
    paper="arXiv:2401.06066, arXiv:2408.15664, arXiv:2412.19437",
    trains=True,
    forbids=True,
)
class DeepSeek(Router):
    """s = softmax or sigmoid of W x; s + b decides who is selected, s alone is the weight.

    The bias b balances without a gradient: after each training pass it goes down by `update` for experts with more
    than the mean load and up for the others (`update` 0 switches it off). With `groups` above 1 a token may only go
    to experts of its `kept_groups` best groups, a group counting as the sum of its `best` best s + b: 1 in
    DeepSeek-V2 (where groups are devices), 2 in V3. `scale` multiplies the weights. O(T D E).

    DeepSeekMoE's first version is softmax, no bias, no groups, with thin and shared experts and balance losses `load`
    (experts) and `group_load` (devices). The bias counts every pass of the layer, one each under gradient
    accumulation, where DeepSeek counts optimizer steps.
    """

    bias_E: Tensor

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        gate: Annotated[str, "softmax or sigmoid"] = "sigmoid",
        renormalise: Annotated[bool, "divide a token's selected weights by their sum"] = True,
        scale: Annotated[float, "factor on the weights"] = 1.0,
        update: Annotated[float, "step of the balancing bias; 0 for none"] = 0.001,
        groups: Annotated[int, "groups of equally many experts"] = 1,
        kept_groups: Annotated[int, "groups a token may go to"] = 1,
        best: Annotated[int, "how many scores count for a group"] = 2,
    ) -> None:
        super().__init__(d_model, experts)
        if gate not in GATES:
            raise PumiceError(f"gate={gate!r} is none of {', '.join(GATES)}.")
        if groups < 1 or experts % groups:
            raise PumiceError(f"groups={groups!r} of router 'deepseek' must divide the {experts} experts.")
        if not 1 <= kept_groups <= groups:
            raise PumiceError(f"kept_groups={kept_groups!r} is outside 1..{groups}, the groups there are.")
        self.gate, self.renormalise, self.scale, self.update = gate, renormalise, scale, update
        self.groups, self.kept_groups, self.best = groups, kept_groups, best
        self.weight_ED = nn.Parameter(torch.empty(experts, d_model))
        nn.init.normal_(self.weight_ED, std=0.006)
        self.register_buffer("bias_E", torch.zeros(experts))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        logits_TE = F.linear(x_TD, self.weight_ED)
        weight_TE = GATES[self.gate](logits_TE)
        select_TE = weight_TE.detach() + self.bias_E
        allowed_TE = None
        if self.kept_groups < self.groups:
            allowed_TE = allowed_groups(select_TE, self.groups, self.kept_groups, self.best)
        if not self.renormalise:
            return Routing(logits_TE, self.scale * weight_TE, select_TE, allowed_TE)
        return Routing(logits_TE, weight_TE, select_TE, allowed_TE, renormalise=True, total=self.scale)

    @torch.no_grad()
    def observe(self, plan: BasePlan) -> None:
        """Move the bias towards equal loads."""
        load_E = plan.asked_E.to(self.bias_E.dtype)
        if self.update and load_E.sum() > 0:
            self.bias_E += self.update * torch.sign(load_E.mean() - load_E)
