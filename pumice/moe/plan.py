"""Who goes where: the plans between router and experts. Nothing has moved yet when a plan is made.

`Plan` sends tokens to experts, `DensePlan` mixes tokens into slots, `MergePlan` merges experts for groups of tokens.
Each carries the routing that it came from, so that losses and statistics belong to the plan.
Legend: T tokens, E experts, K experts of a token, A assignments (token, expert), S slots, G groups, L tokens of a group.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pumice.core import select
from pumice.moe.routing import Routing


@dataclass(kw_only=True, eq=False)
class BasePlan:
    """What every plan has: its routing, its losses, and the numbers that say how well it uses the experts."""

    routing: Routing | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    """All auxiliary losses of this plan, weighted: the router's, the assignment's, the balance losses."""

    def __post_init__(self) -> None:
        if self.routing is not None:
            self.losses = {**self.routing.losses, **self.losses}

    @property
    def tokens(self) -> int:
        raise NotImplementedError

    @property
    def experts(self) -> int:
        raise NotImplementedError

    @property
    def load_E(self) -> Tensor:
        """Tokens that each expert processes (fractions where a token is shared out), without gradients."""
        raise NotImplementedError

    @property
    def importance_E(self) -> Tensor:
        """Combine weight that each expert gets, summed over tokens; differentiable."""
        raise NotImplementedError

    @property
    def asked_E(self) -> Tensor:
        """As `load_E`, but before a capacity refused anything."""
        return self.load_E

    @property
    def dropped(self) -> int:
        """Assignments that a capacity refused."""
        return 0

    @property
    def probability_E(self) -> Tensor:
        """Mean over tokens of the router's normalised weights: the P of load-balance losses; differentiable."""
        if self.routing is None:
            return self.importance_E / self.importance_E.sum().clamp_min(1e-30)
        return self.routing.per_expert(self.routing.probability_TE) / max(self.routing.tokens, 1)

    @property
    def unused(self) -> list[int]:
        """Experts that get nothing."""
        return (self.load_E == 0).nonzero().flatten().tolist()

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of a token's normalised weights, in nats: 0 is a firm choice, log E none."""
        if self.routing is None or self.routing.tokens == 0:
            return torch.zeros(())
        return torch.special.entr(self.routing.probability_TE).sum(1).mean()

    @property
    def z_loss(self) -> Tensor:
        """Mean squared log-sum-exp of the logits, unweighted."""
        if self.routing is None or self.routing.tokens == 0:
            return torch.zeros(())
        return self.routing.logits_TE.logsumexp(1).square().mean()

    def statistics(self) -> dict[str, float]:
        """Plain numbers to be logged.

        `load_max` and `load_min` are the fullest and emptiest expert relative to the mean, `load_cv` the coefficient
        of variation, `drop_rate` the share of assignments that a capacity refused, `per_token` the mean number of
        experts a token gets, `entropy` in nats.
        """
        with torch.no_grad():
            load_E = self.load_E.double()
            mean = load_E.mean().clamp_min(1e-30)
            importance_E = self.importance_E.double()
            total = float(load_E.sum())
            return {
                "tokens": float(self.tokens),
                "per_token": total / max(self.tokens, 1),
                "load_max": float(load_E.max() / mean),
                "load_min": float(load_E.min() / mean),
                "load_cv": float(load_E.std(unbiased=False) / mean),
                "importance_cv": float(importance_E.std(unbiased=False) / importance_E.mean().abs().clamp_min(1e-30)),
                "entropy": float(self.entropy),
                "z_loss": float(self.z_loss),
                "drop_rate": self.dropped / max(total + self.dropped, 1),
                "unused": float((load_E == 0).sum()),
                **{f"loss_{name}": float(loss) for name, loss in self.losses.items()},
            }

    def _plain(self) -> dict[str, object]:
        routing = None if self.routing is None else self.routing.detach()
        return {"routing": routing, "losses": {name: loss.detach() for name, loss in self.losses.items()}}


@dataclass(eq=False)
class Plan(BasePlan):
    """Assignments of tokens to experts, sorted by expert, and within an expert by token.

    Assignment a sends token `token_A[a]` to the expert e with `offsets_E1[e] <= a < offsets_E1[e + 1]`; the output of
    a token is the sum over its assignments of `weight_A[a]` times the expert's output. A token may have none (its
    output is 0) and an expert may have none. Make one with `top_k`, `mask` or `pairs`.
    """

    token_A: Tensor
    """int64."""
    offsets_E1: Tensor
    """int64 [E + 1], from 0 to A."""
    weight_A: Tensor
    """float, differentiable."""
    count: int
    """Tokens in the batch."""
    wanted_E: Tensor | None = None
    """int64: assignments before a capacity refused some; None where there is no capacity."""
    in_order: bool = False
    """Assignment a is token a, with weight 1: there is nothing to gather, scale or sum."""

    @property
    def tokens(self) -> int:
        return self.count

    @property
    def experts(self) -> int:
        return self.offsets_E1.shape[0] - 1

    @cached_property
    def expert_A(self) -> Tensor:
        """int64: the expert of each assignment."""
        place_A = torch.arange(self.token_A.shape[0], device=self.token_A.device)
        return torch.searchsorted(self.offsets_E1, place_A, right=True) - 1

    @cached_property
    def by_token_A(self) -> Tensor:
        """int64: the assignments in the order of their tokens (and of experts within a token).

        With `starts_T1` this is the inverse that a combine needs which sums each token's parts in a fixed order.
        """
        return torch.argsort(self.token_A, stable=True)

    @cached_property
    def starts_T1(self) -> Tensor:
        """int64 [T + 1]: token t's assignments are `by_token_A[starts_T1[t]:starts_T1[t + 1]]`."""
        edges_T1 = torch.arange(self.count + 1, device=self.token_A.device)
        return torch.searchsorted(self.token_A[self.by_token_A], edges_T1)

    @property
    def load_E(self) -> Tensor:
        return self.offsets_E1.diff()

    @property
    def asked_E(self) -> Tensor:
        return self.load_E if self.wanted_E is None else self.wanted_E

    @property
    def dropped(self) -> int:
        return 0 if self.wanted_E is None else int(self.wanted_E.sum()) - self.token_A.shape[0]

    @property
    def importance_E(self) -> Tensor:
        return self.weight_A.new_zeros(self.experts).index_add(0, self.expert_A, self.weight_A)

    @property
    def combine_TE(self) -> Tensor:
        """The plan as a dense matrix of combine weights, 0 where a token does not go: for tests and plots."""
        flat = self.weight_A.new_zeros(self.count * self.experts)
        return flat.index_add(0, self.token_A * self.experts + self.expert_A, self.weight_A).view(-1, self.experts)

    @classmethod
    def pairs(
        cls,
        token_A: Tensor,
        expert_A: Tensor,
        weight_A: Tensor,
        tokens: int,
        experts: int,
        routing: Routing | None = None,
    ) -> Plan:
        """A plan of any (token, expert, weight) list; a pair that occurs twice counts twice."""
        order_A = torch.argsort(expert_A * max(tokens, 1) + token_A, stable=True)
        edges_E1 = torch.arange(experts + 1, device=expert_A.device)
        offsets_E1 = torch.searchsorted(expert_A[order_A], edges_E1)
        return cls(token_A[order_A], offsets_E1, weight_A[order_A], tokens, routing=routing)

    @classmethod
    def top_k(cls, index_TK: Tensor, weight_TK: Tensor, experts: int, routing: Routing | None = None) -> Plan:
        """Every token goes to the K experts that its row names."""
        tokens, k = index_TK.shape
        token_A = torch.arange(tokens, device=index_TK.device).repeat_interleave(k)
        return cls.pairs(token_A, index_TK.flatten(), weight_TK.flatten(), tokens, experts, routing)

    @classmethod
    def mask(cls, mask_TE: Tensor, weight_TE: Tensor, routing: Routing | None = None) -> Plan:
        """Every token goes to the experts where its row of the mask is True."""
        expert_A, token_A = mask_TE.t().nonzero(as_tuple=True)
        offsets_E1 = torch.nn.functional.pad(mask_TE.sum(0).cumsum(0), (1, 0))
        return cls(token_A, offsets_E1, weight_TE[token_A, expert_A], mask_TE.shape[0], routing=routing)

    @classmethod
    def everything(cls, tokens: int, like: Tensor) -> Plan:
        """All tokens to one expert with weight 1: what a shared expert runs."""
        return cls.slots(tokens, 1, like)

    @classmethod
    def slots(cls, each: int, experts: int, like: Tensor) -> Plan:
        """`each · experts` tokens, the first `each` to expert 0, and so on, with weight 1."""
        token_A = torch.arange(each * experts, device=like.device)
        offsets_E1 = torch.arange(experts + 1, device=like.device) * each
        return cls(token_A, offsets_E1, like.new_ones(each * experts), each * experts, in_order=True)

    def keep(self, kept_A: Tensor) -> Plan:
        """The plan of the assignments where `kept_A` is True; the others count as dropped."""
        before = torch.nn.functional.pad(kept_A.cumsum(0), (1, 0))
        return dataclasses.replace(
            self,
            token_A=self.token_A[kept_A],
            offsets_E1=before[self.offsets_E1],
            weight_A=self.weight_A[kept_A],
            wanted_E=self.asked_E,
            in_order=False,
        )

    def renormalised(self) -> Plan:
        """The plan with each token's weights divided by their sum."""
        sum_T = self.weight_A.new_zeros(self.count).index_add(0, self.token_A, self.weight_A)
        sum_T = sum_T.clamp_min(torch.finfo(self.weight_A.dtype).tiny)
        return dataclasses.replace(self, weight_A=self.weight_A / sum_T[self.token_A])

    def limit(self, capacity: int, priority_A: Tensor) -> Plan:
        """At most `capacity` assignments an expert: those of the largest `priority_A`, earlier ones at ties."""
        return self.keep(select.best_of_groups(priority_A, self.expert_A, capacity))

    def detach(self) -> Plan:
        """The same without gradients."""
        return dataclasses.replace(self, weight_A=self.weight_A.detach(), **self._plain())


@dataclass(eq=False)
class DensePlan(BasePlan):
    """Soft mixing within each of G equally long groups: slot s of group g gets `Σ_l dispatch_GLS[g, l, s] x_gl`, and
    token l gets `Σ_s combine_GLS[g, l, s] y_gs`.

    T = G · L tokens in order. The S slots belong to the experts in order, S / E each.
    """

    dispatch_GLS: Tensor
    combine_GLS: Tensor
    count: int
    """Experts."""

    @property
    def tokens(self) -> int:
        return self.dispatch_GLS.shape[0] * self.dispatch_GLS.shape[1]

    @property
    def experts(self) -> int:
        return self.count

    @property
    def slots(self) -> int:
        """Slots of each expert in each group."""
        return self.dispatch_GLS.shape[2] // self.count

    @property
    def load_E(self) -> Tensor:
        return self.dispatch_GLS.detach().sum((0, 1)).view(self.count, -1).sum(1)

    @property
    def importance_E(self) -> Tensor:
        return self.combine_GLS.sum((0, 1)).view(self.count, -1).sum(1)

    def dispatch(self, x_TD: Tensor) -> Tensor:
        """The slots' inputs, expert by expert: [E · G · S / E, D]."""
        groups, length, _ = self.dispatch_GLS.shape
        x_GLD = x_TD.view(groups, length, x_TD.shape[1])
        slots_GSD = torch.einsum("gls,gld->gsd", self.dispatch_GLS.to(x_TD.dtype), x_GLD)
        return slots_GSD.unflatten(1, (self.count, self.slots)).transpose(0, 1).flatten(0, 2)

    def combine(self, y_SD: Tensor) -> Tensor:
        """Back from the slots' outputs, in the order of `dispatch`, to [T, D]."""
        groups = self.combine_GLS.shape[0]
        y_GSD = y_SD.view(self.count, groups, self.slots, y_SD.shape[1]).transpose(0, 1).flatten(1, 2)
        return torch.einsum("gls,gsd->gld", self.combine_GLS.to(y_SD.dtype), y_GSD).flatten(0, 1)

    def detach(self) -> DensePlan:
        """The same without gradients."""
        parts = {"dispatch_GLS": self.dispatch_GLS.detach(), "combine_GLS": self.combine_GLS.detach()}
        return dataclasses.replace(self, **parts, **self._plain())


@dataclass(eq=False)
class MergePlan(BasePlan):
    """Soft merging: the tokens of group g run through one expert whose parameters are `Σ_e weight_GE[g, e] W_e`."""

    weight_GE: Tensor
    group_T: Tensor
    """int64."""

    @property
    def tokens(self) -> int:
        return self.group_T.shape[0]

    @property
    def experts(self) -> int:
        return self.weight_GE.shape[1]

    @property
    def load_E(self) -> Tensor:
        return self.importance_E.detach()

    @property
    def importance_E(self) -> Tensor:
        size_G = torch.bincount(self.group_T, minlength=self.weight_GE.shape[0])
        return size_G.to(self.weight_GE.dtype) @ self.weight_GE

    def by_group(self) -> Plan:
        """The tokens sent to their groups, as to G experts, with weight 1."""
        ones_T = self.weight_GE.new_ones(self.tokens)
        tokens_T = torch.arange(self.tokens, device=self.group_T.device)
        return Plan.pairs(tokens_T, self.group_T, ones_T, self.tokens, self.weight_GE.shape[0])

    def detach(self) -> MergePlan:
        """The same without gradients."""
        return dataclasses.replace(self, weight_GE=self.weight_GE.detach(), **self._plain())


AnyPlan = Plan | DensePlan | MergePlan
