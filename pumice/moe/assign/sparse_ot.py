"""Optimal transport with a limit on the tokens of an expert.

Legend: T tokens, E experts, K most tokens of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import assign
from pumice.moe.plan import Plan
from pumice.moe.routing import RouteContext, Routing

SOLVERS = ("lbfgs", "adam")
FORMS = ("semi_dual", "dual")


def semi_dual(a_T: Tensor, score_TE: Tensor, mass_E: Tensor, keep: int, gamma: float) -> tuple[Tensor, Tensor]:
    """Σ a (1 for each token) minus the experts' conjugates at the potential a, and the plan [T, E] that attains them.

    The plan's column e maximises <t, a + score_e> - γ/2 ‖t‖² over t >= 0 with sum `mass_E[e]` and at most `keep`
    entries: the projection of the `keep` largest onto a simplex. 1 minus the plan's rows is the gradient.
    """
    value_EK, token_EK = select.largest((a_T[:, None] + score_TE).t().contiguous(), keep)
    rank_K = torch.arange(1, keep + 1, device=a_T.device)
    level_EK = (value_EK.cumsum(1) - gamma * mass_E[:, None]) / rank_K
    inside_E1 = (value_EK > level_EK).sum(1, keepdim=True)
    share_EK = ((value_EK - level_EK.gather(1, inside_E1 - 1)) / gamma).clamp_min(0)
    value = a_T.sum() - (share_EK * value_EK).sum() + gamma / 2 * share_EK.square().sum()
    return value, torch.zeros_like(score_TE).t().scatter(1, token_EK, share_EK).t()


def dual(a_T: Tensor, b_E: Tensor, score_TE: Tensor, mass_E: Tensor, keep: int, gamma: float) -> tuple[Tensor, Tensor]:
    """The same with a potential for the experts too, whose masses then hold only at the maximum."""
    value_EK, token_EK = select.largest((a_T[:, None] + b_E + score_TE).t().contiguous(), keep)
    share_EK = value_EK.clamp_min(0) / gamma
    value = a_T.sum() + (b_E * mass_E).sum() - gamma / 2 * share_EK.square().sum()
    return value, torch.zeros_like(score_TE).t().scatter(1, token_EK, share_EK).t()


def transport(
    score_TE: Tensor, mass_E: Tensor, keep: int, gamma: float, *, form: str, solver: str, steps: int
) -> Tensor:
    """The plan [T, E]: rows sum to 1 (at convergence), columns to `mass_E` and have at most `keep` entries."""
    tokens, experts = score_TE.shape
    potential = torch.zeros(tokens + experts * (form == "dual"), dtype=score_TE.dtype, device=score_TE.device)

    def evaluate(at: Tensor) -> tuple[Tensor, Tensor]:
        if form == "semi_dual":
            return semi_dual(at, score_TE, mass_E, keep, gamma)
        return dual(at[:tokens], at[tokens:], score_TE, mass_E, keep, gamma)

    def descent(at: Tensor) -> tuple[Tensor, Tensor]:
        value, plan_TE = evaluate(at)
        gradient = plan_TE.sum(1) - 1
        if form == "dual":
            gradient = torch.cat([gradient, plan_TE.sum(0) - mass_E])
        return -value / tokens, gradient / tokens

    return evaluate(_minimise(descent, potential, solver, steps))[1]


def _minimise(descent: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, solver: str, steps: int) -> Tensor:
    variable = start.clone().requires_grad_()
    if solver == "lbfgs":
        rounds = 1
        optimizer = torch.optim.LBFGS(
            [variable], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=1e-12
        )
    else:
        rounds, optimizer = steps, torch.optim.Adam([variable], lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def closure() -> float:
        value, gradient = descent(variable.detach())
        variable.grad = gradient
        return float(value)

    for _ in range(rounds):
        optimizer.step(closure)
        if solver == "adam":
            schedule.step()
    return variable.detach()


@assign("sparse_ot", key="sparsity-constrained-ot", paper="arXiv:2209.15466", causal=False, balanced=True)
def sparse_ot(
    routing: Routing,
    context: RouteContext,
    *,
    top_k: Annotated[int, "experts of a token on average, at most: an expert has up to T · top_k / E tokens"] = 2,
    gamma: Annotated[float, "quadratic regularisation; small is close to plain optimal transport"] = 0.1,
    form: Annotated[str, "what is maximised: semi_dual or dual"] = "semi_dual",
    solver: Annotated[str, "lbfgs or adam"] = "lbfgs",
    steps: Annotated[int, "of the solver"] = 50,
) -> Plan:
    """Tokens go where a transport plan of least cost sends them, with at most k tokens an expert.

    Every token has mass 1, every expert T / E, the cost of a pair is minus its score. The plan minimises cost plus
    γ/2 ‖t‖² among those with at most k non-zeros in each expert's column, through the concave dual of the problem (a
    lower bound where the limit binds). Experts have equal mass by construction with the semi-dual; how many tokens
    share it is free up to k. With k = 1 it is plain transport, with k = T quadratically regularised.

    The plan selects, without gradients; the combine weights are the routing's, renormalised if the router says so.
    That is ours: the paper's way to weight V-MoE's experts is not known to us. Not causal. O(steps · T E log T).
    """
    if form not in FORMS or solver not in SOLVERS:
        raise PumiceError(
            f"form={form!r} must be one of {', '.join(FORMS)} and solver={solver!r} one of {', '.join(SOLVERS)}."
        )
    if gamma <= 0 or steps < 1:
        raise PumiceError(f"gamma={gamma} must be above 0 and steps={steps} at least 1.")
    tokens, experts = routing.weight_TE.shape
    if not tokens:
        return Plan.mask(torch.zeros_like(routing.weight_TE, dtype=torch.bool), routing.weight_TE, routing)
    score_TE = routing.score_TE.double()
    possible_TE = score_TE > -torch.inf
    # Far below any other score, but finite: a potential must be able to outweigh it where nothing else is left.
    score_TE = score_TE.masked_fill(~possible_TE, float(routing.weight_TE.detach().min()) - 1e3)
    mass_E = score_TE.new_full((experts,), tokens / experts)
    keep = min(tokens, math.ceil(tokens * top_k / experts))
    plan_TE = transport(score_TE, mass_E, keep, gamma, form=form, solver=solver, steps=steps)
    plan = Plan.mask((plan_TE > 0) & possible_TE, routing.weight_TE, routing)
    return plan.renormalised() if routing.renormalise else plan
