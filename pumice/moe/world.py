"""Balance over all processes of a group: one plan's numbers summed up, for losses and for looking at.

Legend: E experts, W processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.moe.exchange import Exchange
from pumice.moe.layer import MoE
from pumice.moe.plan import AnyPlan, BasePlan

_KEPT = "_world"


class WorldPlan(BasePlan):
    """What a plan says of itself, over the tokens of all processes: loads, probabilities, entropy, z-loss, drops.

    Differentiable where the plan is: with the mean over processes that DDP takes, gradients are those of one process
    that has all tokens. `routing` is this process's own.
    """

    def __init__(self, plan: AnyPlan, exchange: Exchange) -> None:
        super().__init__(routing=plan.routing)
        device, share = plan.load_E.device, plan.tokens
        parts = {
            "tokens": torch.tensor(float(share)),
            "dropped": torch.tensor(float(plan.dropped)),
            "load_E": plan.load_E,
            "asked_E": plan.asked_E,
            "importance_E": plan.importance_E,
            "probability_E": plan.probability_E * share,
            "entropy": plan.entropy * share,
            "z_loss": plan.z_loss * share,
            **{f"loss {name}": loss.detach() / exchange.world for name, loss in plan.losses.items()},
        }
        # In double precision, so that counts are exact.
        flat = torch.cat([part.to(device, torch.float64).flatten() for part in parts.values()])
        sums = exchange.total(flat, "the balance of experts").split([part.numel() for part in parts.values()])
        self._dtype = plan.importance_E.dtype
        self._sums: dict[str, Tensor] = dict(zip(parts, sums, strict=True))
        self._experts = plan.experts
        self.losses = {name[5:]: loss[0] for name, loss in self._sums.items() if name.startswith("loss ")}

    def _mean(self, name: str) -> Tensor:
        return (self._sums[name] / self._sums["tokens"].clamp_min(1)).to(self._dtype)

    @property
    def tokens(self) -> int:
        return int(self._sums["tokens"])

    @property
    def experts(self) -> int:
        return self._experts

    @property
    def dropped(self) -> int:
        return int(self._sums["dropped"])

    @property
    def load_E(self) -> Tensor:
        return self._sums["load_E"].detach()

    @property
    def asked_E(self) -> Tensor:
        return self._sums["asked_E"].detach()

    @property
    def importance_E(self) -> Tensor:
        return self._sums["importance_E"].to(self._dtype)

    @property
    def probability_E(self) -> Tensor:
        return self._mean("probability_E")

    @property
    def entropy(self) -> Tensor:
        return self._mean("entropy")[0]

    @property
    def z_loss(self) -> Tensor:
        return self._mean("z_loss")[0]


class _Worldwide:
    """The plan of all processes in the place of this one's; as a hook, for a balance loss."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def plan(self, plan: Any) -> WorldPlan:
        # Kept on the plan, so that the router and all losses share one all-reduce.
        if _KEPT not in plan.__dict__:
            plan.__dict__[_KEPT] = WorldPlan(plan, self.exchange)
        return plan.__dict__[_KEPT]

    def __call__(self, loss: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        plan, *rest = args
        return self.plan(plan), *rest


def use_world(layer: MoE, exchange: Exchange) -> None:
    """Let the layer's router, where it learns from loads, and its balance losses look at the tokens of all processes."""
    worldwide = _Worldwide(exchange)
    layer.observed = worldwide.plan
    for loss in layer.balance:
        loss.register_forward_pre_hook(worldwide)
