"""Local search over permutations of the experts, around any router.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import torch
from torch import Tensor, nn

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.core.registry import router
from pumice.moe.route.base import Router, gumbel
from pumice.moe.route.dselect_k import entropy
from pumice.moe.routing import RouteContext, Routing

NOTHING = 1e-5
"""Entries of a soft permutation below this count as 0, so that the search keeps the router's sparsity."""


def sinkhorn(log_EE: Tensor, rounds: int) -> Tensor:
    """A doubly stochastic matrix: exp(log_EE) with rows and columns scaled in turn."""
    for _ in range(rounds):
        log_EE = log_EE - log_EE.logsumexp(1, keepdim=True)
        log_EE = log_EE - log_EE.logsumexp(0, keepdim=True)
    return log_EE.exp()


@router("permuted", key="comet", paper="arXiv:2306.02824", chance=True)
class Permuted(Router):
    """Another router whose columns are given to experts by a learned permutation: COMET's local search.

    In the first `search` of the training (`context.progress`) the weights are multiplied by a soft permutation: Sinkhorn
    scaling of (L + noise) / τ, L learned, τ falling from 1e-3 to 1e-7 and the rounds growing from 20 to 150 as in the
    authors' code. Afterwards, and whenever nobody trains, it is the nearest permutation (an assignment problem, solved
    by scipy). Its entropy is a loss during the search. O(T E²) while searching, O(T E + E³) after it.

    One permutation for the whole router; the paper also tries one for each tree. Entries below 1e-5 are 0.
    """

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        router: Annotated[str | dict, "whose columns are permuted: a name or {name: …, option: …}"] = "comet",
        search: Annotated[float, "share of the training that searches"] = 0.1,
        noise: Annotated[float, "factor of the Gumbel noise"] = 0.01,
        entropy: Annotated[float, "factor of the permutation's entropy"] = 1e-3,
    ) -> None:
        super().__init__(d_model, experts)
        bound = registry.router.bind(router)
        if bound.info.extras["columns"] != "experts":
            raise PumiceError(
                f"router={bound.name!r} inside 'permuted' scores {bound.info.extras['columns']}, not experts."
            )
        if not 0 < search <= 1:
            raise PumiceError(f"search={search} is outside (0, 1], the share of the training that searches.")
        self.inner = bound(d_model, experts)
        self.search, self.noise, self.entropy = search, noise, entropy
        self.log_EE = nn.Parameter(torch.empty(experts, experts).uniform_(-0.05, 0.05))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        routing = self.inner(x_TD, context)
        searching = context.training and context.progress is not None and context.progress < self.search
        if not searching:
            return self.renamed(routing)
        done = float(context.progress or 0) / self.search
        soft_EE = self.soft(done, context.generator)
        weight_TE = routing.weight_TE @ soft_EE
        share_EE = soft_EE / soft_EE.sum(1, keepdim=True)
        spread = entropy(share_EE).sum() + entropy(soft_EE).sum()
        losses = {**routing.losses, "permuted": self.entropy * spread}
        others = {
            name: value @ soft_EE.detach() for name, value in (("select_TE", routing.select_TE),) if value is not None
        }
        if routing.allowed_TE is not None:
            others["allowed_TE"] = routing.allowed_TE.to(soft_EE.dtype) @ soft_EE.detach() > 0
        return dataclasses.replace(routing, logits_TE=weight_TE, weight_TE=weight_TE, losses=losses, **others)

    def soft(self, done: float, generator: torch.Generator | None) -> Tensor:
        """The soft permutation after a share `done` of the search."""
        temperature = 10 ** (-3 - 4 * done)
        log_EE = self.log_EE + self.noise * gumbel(self.log_EE, generator)
        soft_EE = sinkhorn(log_EE / temperature, int(20 + 130 * done))
        return torch.where(soft_EE < NOTHING, torch.zeros_like(soft_EE), soft_EE)

    @torch.no_grad()
    def column_E(self) -> Tensor:
        """int64: the router's column that each expert has."""
        from scipy.optimize import linear_sum_assignment

        _, expert = linear_sum_assignment(self.log_EE.double().cpu().numpy(), maximize=True)
        return torch.argsort(torch.from_numpy(expert)).to(self.log_EE.device)

    def renamed(self, routing: Routing) -> Routing:
        """The routing with its columns in the order of the experts."""
        column_E = self.column_E()
        names = ("logits_TE", "weight_TE", "select_TE", "allowed_TE")
        picked = {
            name: None if getattr(routing, name) is None else getattr(routing, name)[:, column_E] for name in names
        }
        return dataclasses.replace(routing, **picked)
