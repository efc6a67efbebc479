"""Optimal BERT Surgeon: groups judged and removed together, the rest of their Fisher block makes up for them.

Shapes: O outputs, I inputs, K blocks of a row, B weights of a block, Q weights of a group.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Annotated

import torch
from torch import Tensor

from pumice.core.registry import recovery
from pumice.core.stats import Stats
from pumice.prune.layer import Score, Selector
from pumice.prune.score.obert import inverse_blocks

MOST_CHOICES = 100
"""N:M groups with more ways to choose than this (8:16 has 12,870) are chosen weight by weight."""


@recovery("obert", simpler="obs", key="obert", paper="arXiv:2203.07259", needs=("gradients",), selects="obert")
def obert(
    w_OI: Tensor,
    stats: Stats,
    score: Score | None,
    select: Selector,
    *,
    block: Annotated[int, "neighbouring weights of a row whose interplay is kept"] = 50,
    damp: Annotated[float, "λ as a share of the mean squared gradient of the layer"] = 0.001,
    diagonal: Annotated[float, "share of every weight's own squared gradient added to its λ"] = 3.0,
) -> tuple[Tensor, Tensor]:
    """Remove weights or whole groups at the least rise of the loss by the block Fisher matrix, and compensate (oBERT).

    A group Q costs ½ w_Qᵀ([F⁻¹]_QQ)⁻¹w_Q: the part of a row inside a block of the pattern (summed over its rows), or
    what an N:M group drops (the cheapest choice of all). Everything dropped in a Fisher block is then removed together:
    δw = −F⁻¹E_Q([F⁻¹]_QQ)⁻¹w_Q, which is the least that the quadratic model allows. Beside another score that score
    sets the mask and this only compensates.

    Fisher blocks are as wide as a whole number of the pattern's groups, or as a part of one where the group is wider;
    for how F is built see the score `obert`. The paper removes a dropped set by its single updates added up where the
    pattern is unstructured; the joint one here is exact.

    One-shot on a language model it is between Wanda and SparseGPT at 50 % and behind SparseGPT everywhere (docs/quality.md); the
    paper uses it gradually, with training between.
    """
    groups = _groups(select, w_OI)
    width = groups[1] if groups is not None else 1
    block = block // width * width if width <= block else _largest_divisor(width, block)
    if score is not None:
        mask = select.whole(score(w_OI))
    else:
        scores = torch.empty_like(w_OI)
        for rows, w_KB, inverse_KBB in inverse_blocks(w_OI, stats["gradients"], block, damp, diagonal):
            part = _scores(w_KB, inverse_KBB, groups)
            scores[rows] = part.flatten(1)[:, : w_OI.shape[1]]
        mask = select.whole(scores)
    new = torch.empty_like(w_OI)
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % min(block, mask.shape[1])), value=True)
    for rows, w_KB, inverse_KBB in inverse_blocks(w_OI, stats["gradients"], block, damp, diagonal):
        change = compensation(w_KB, inverse_KBB, padded[rows].view(w_KB.shape))
        new[rows] = (w_KB + change).flatten(1)[:, : w_OI.shape[1]]
    return new * mask, mask


def compensation(w_KB: Tensor, inverse_KBB: Tensor, kept_KB: Tensor) -> Tensor:
    """δw = −F⁻¹E_Q([F⁻¹]_QQ)⁻¹w_Q for Q = everything that is not kept, in every block at once."""
    gone = (~kept_KB).to(w_KB.dtype)
    # Rows and columns of kept weights become those of the identity, so that blocks with any number gone are one batch.
    inner = inverse_KBB * gone[..., :, None] * gone[..., None, :] + torch.diag_embed(1 - gone)
    pressure = torch.cholesky_solve((w_KB * gone)[..., None], torch.linalg.cholesky(inner))
    return -(inverse_KBB @ pressure)[..., 0]


def _groups(select: Selector, w_OI: Tensor) -> tuple[str, int, int] | None:
    """What the pattern drops together: ("block", columns, 0) or ("nm", M, N); None for single weights."""
    made = select.pattern.storage(*w_OI.shape)
    if made is None:
        return None
    kind, sizes = made
    if kind == "block":
        return kind, sizes["c"], 0
    few = kind == "nm" and math.comb(sizes["m"], sizes["n"]) <= MOST_CHOICES
    return (kind, sizes["m"], sizes["n"]) if few else None


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(max(1, limit), 0, -1) if number % d == 0)


def _scores(w_KB: Tensor, inverse_KBB: Tensor, groups: tuple[str, int, int] | None) -> Tensor:
    """Scores [o, K, B] whose selection by the pattern keeps the groups that cost most."""
    b = w_KB.shape[-1]
    if groups is None:
        return w_KB.square() / (2 * torch.diagonal(inverse_KBB, dim1=-2, dim2=-1))
    kind, width, n = groups
    width = min(width, b)
    w_Q = w_KB.unflatten(-1, (-1, width))
    # The squares on the diagonal, of one group each: [o, K, B/Q, Q, Q].
    inner = inverse_KBB.unflatten(-1, (-1, width)).unflatten(-3, (-1, width))
    inner = torch.diagonal(inner, dim1=-4, dim2=-2).movedim(-1, -3)
    if kind == "block":
        # Spread evenly, since the pattern sums the scores of a group.
        cost = (w_Q * torch.linalg.solve(inner, w_Q)).sum(-1, keepdim=True) / (2 * width)
        return cost.expand_as(w_Q).flatten(-2)
    best, kept = torch.full(w_Q.shape[:-1], torch.inf, device=w_Q.device), torch.zeros_like(w_Q)
    for keep in combinations(range(width), n):
        gone = [column for column in range(width) if column not in keep]
        if not gone:
            return torch.ones_like(w_KB)
        w_gone = w_Q[..., gone]
        cost = (w_gone * torch.linalg.solve(inner[..., gone, :][..., gone], w_gone)).sum(-1) / 2
        choice = torch.zeros(width, device=w_Q.device)
        choice[list(keep)] = 1
        kept = torch.where((cost < best)[..., None], choice, kept)
        best = torch.minimum(cost, best)
    return kept.flatten(-2)
