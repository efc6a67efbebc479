"""Every expert gets the same number of tokens: the best such assignment.

Legend: T tokens, E experts, N tokens that are padding.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import assign
from pumice.moe.plan import Plan
from pumice.moe.routing import RouteContext, Routing

SOLVERS = ("auction", "exact")


def exact(score_TE: Tensor) -> Tensor:
    """expert_T of the best assignment with T/E tokens an expert, rounded up or down, by scipy: O(T³)."""
    from scipy.optimize import linear_sum_assignment

    tokens, experts = score_TE.shape
    if tokens == 0:
        return torch.zeros(0, dtype=torch.int64, device=score_TE.device)
    least, rest = divmod(tokens, experts)
    value_TE = score_TE.detach().double().cpu()
    # One slot of each expert beyond `least` is optional: padding tokens, worth nothing there, take those left over.
    value_TS = value_TE.repeat(1, least + (rest > 0))
    padding = value_TS.shape[1] - tokens
    forbidden = -1.0 - 4.0 * tokens * float(value_TE.abs().max())
    value_NS = torch.full((padding, value_TS.shape[1]), forbidden, dtype=torch.float64)
    value_NS[:, least * experts :] = 0.0
    _, column = linear_sum_assignment(torch.cat([value_TS, value_NS]).numpy(), maximize=True)
    return torch.from_numpy(column[:tokens] % experts).to(score_TE.device)


def auction(score_TE: Tensor, tolerance: float) -> Tensor:
    """expert_T of an assignment with T/E tokens an expert (rounded up or down), by an auction.

    Tokens bid for units of experts; an expert keeps its highest bids, and its price is the lowest it keeps. A token bids
    what makes it indifferent to its second choice, plus ε. Once every token has a place the total is within
    (T + N) · ε of the best, ε = `tolerance` times the range of the scores (Bertsekas' auction for objects of several
    identical units). All tokens without a place bid at once, and ε shrinks in steps from a quarter of the range.
    """
    tokens, experts = score_TE.shape
    if tokens == 0 or experts == 1:
        return torch.zeros(tokens, dtype=torch.int64, device=score_TE.device)
    value_TC, room_C = _units(score_TE.detach().double())
    spread = float(score_TE.max() - score_TE.min()) or 1.0
    price_C = value_TC.new_zeros(value_TC.shape[1])
    last = tolerance * spread
    step = max(spread / 4, last)
    unit_T = _sold(value_TC, room_C, price_C, step)
    while step > last:
        step = max(step / 5, last)
        unit_T = _sold(value_TC, room_C, price_C, step)
    return unit_T[:tokens] % experts


def _units(value_TE: Tensor) -> tuple[Tensor, Tensor]:
    """What is sold, column c being of expert c mod E: each expert's units, and where T / E is not whole one more each.

    Padding tokens, worth nothing anywhere, buy up the additional units that are left over, and may buy no others.
    """
    tokens, experts = value_TE.shape
    least, rest = divmod(tokens, experts)
    room_E = torch.full((experts,), least, device=value_TE.device)
    if not rest:
        return value_TE, room_E
    more_E = torch.ones_like(room_E)
    value_NE = value_TE.new_zeros(experts - rest, experts)
    if not least:
        return torch.cat([value_TE, value_NE]), more_E
    value_NC = torch.cat([torch.full_like(value_NE, -torch.inf), value_NE], 1)
    return torch.cat([value_TE.repeat(1, 2), value_NC]), torch.cat([room_E, more_E])


def _sold(value_TC: Tensor, room_C: Tensor, price_C: Tensor, step: float) -> Tensor:
    """unit_T of one auction in which nobody has a place at first; raises `price_C` in place."""
    unit_T = torch.full((value_TC.shape[0],), -1, dtype=torch.int64, device=value_TC.device)
    bid_T = value_TC.new_zeros(value_TC.shape[0])
    while True:
        free_N = (unit_T < 0).nonzero().flatten()
        if free_N.numel() == 0:
            return unit_T
        profit_N2, choice_N2 = select.largest(value_TC[free_N] - price_C, 2)
        unit_T[free_N] = choice_N2[:, 0]
        bid_T[free_N] = price_C[choice_N2[:, 0]] + profit_N2[:, 0] - profit_N2[:, 1] + step
        held_T = (unit_T >= 0).nonzero().flatten()
        kept_T = select.best_of_groups(bid_T[held_T], unit_T[held_T], room_C)
        unit_T[held_T[~kept_T]] = -1
        held_T = held_T[kept_T]
        full_C = torch.bincount(unit_T[held_T], minlength=room_C.shape[0]) == room_C
        lowest_C = torch.full_like(price_C, torch.inf).scatter_reduce(0, unit_T[held_T], bid_T[held_T], "amin")
        price_C[full_C] = lowest_C[full_C]


@assign("balanced", key="base-layer", paper="arXiv:2103.16716", causal=False, balanced=True, forbids=False, trains=True)
def balanced(
    routing: Routing,
    context: RouteContext,
    *,
    solver: Annotated[str, "auction, or exact (scipy, O(T³))"] = "auction",
    tolerance: Annotated[float, "how far below the best a token may be on average, as a share of the range"] = 1e-3,
) -> Plan:
    """Every expert gets T / E tokens (rounded up or down) so that the sum of the logits is largest: BASE layers.

    In training only; otherwise every token takes its best expert, so that it does not depend on the others. Needs no
    balance loss. What is maximised is the logits, or `select_TE` where a router sets it. BASE's shuffling of tokens
    between workers is not here.

    Raises:
        PumiceError: experts that are not allowed.
    """
    if solver not in SOLVERS:
        raise PumiceError(f"solver={solver!r} is none of {', '.join(SOLVERS)}.")
    if routing.allowed_TE is not None:
        raise PumiceError("assign='balanced' fills every expert alike: use a router that forbids no experts.")
    score_TE = (routing.logits_TE if routing.select_TE is None else routing.select_TE).detach()
    if context.training:
        expert_T = exact(score_TE) if solver == "exact" else auction(score_TE, tolerance)
    else:
        expert_T = select.largest(score_TE, 1)[1].squeeze(1)
    weight_T1 = routing.weight_TE.gather(1, expert_T[:, None])
    plan = Plan.top_k(expert_T[:, None], weight_T1, routing.experts, routing)
    return plan.renormalised() if routing.renormalise else plan
