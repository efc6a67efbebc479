"""The only selection code of the project: top-k, thresholds, N:M and blocks over scores.

Masks are bool, True = kept. A density d keeps `n - floor(n (1 - d))` of n candidates, at least one when d > 0.
Ties are broken by position, so that a selection is deterministic and its count exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pumice.core.errors import PumiceError

LONG = 1 << 16
"""Candidates from which a histogram finds a threshold faster than `kthvalue`."""


def check_density(density: float, name: str = "density") -> float:
    """`density` if it lies in (0, 1], else PumiceError."""
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise PumiceError(f"{name}={density!r} is outside (0, 1]: give the share of weights to keep, 0.5 keeps half.")
    return float(density)


def keep_count(total: int, density: float) -> int:
    """How many of `total` candidates a density keeps."""
    if total == 0:
        return 0
    # The small number undoes float error, which grows with the total: 10 * (1 - 0.7) must count as 3, not 2.
    return max(1, total - math.floor(total * (1 - density) + 1e-9 + total * 4e-16))


def _check(scores: Tensor) -> None:
    if torch.isnan(scores).any():
        raise PumiceError("scores hold NaN: the weights or the calibration activations of this layer are not finite.")


def topk(scores: Tensor, keep: int) -> Tensor:
    """Mask [..., n] of the `keep` largest scores along the last axis."""
    n = scores.shape[-1]
    if keep >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    if keep <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    _check(scores)
    threshold = _kth_largest(scores, keep)
    mask = scores > threshold
    ties = scores == threshold
    room = keep - mask.sum(-1, keepdim=True)
    if scores.dim() == 1 and int(ties.sum()) == int(room):
        return mask | ties
    return mask | (ties & (ties.cumsum(-1) <= room))


def _kth_largest(scores: Tensor, k: int) -> Tensor:
    """The k-th largest of each row, [..., 1]; `kthvalue` is slow on one long row, so that a histogram narrows it down."""
    n = scores.shape[-1]
    rank = n - k + 1
    if scores.dim() == 1 and n >= LONG and scores.dtype == torch.float32 and bool((scores >= 0).all()):
        # Bit patterns of non-negative floats order like the floats; adding zero makes negative zeros positive.
        upper = (scores + 0.0).view(torch.int32) >> 16
        counts = torch.bincount(upper, minlength=1 << 15).flip(0).cumsum(0)
        place = int(torch.searchsorted(counts, torch.tensor(k, device=counts.device)))
        above = int(counts[place - 1]) if place else 0
        scores = scores[upper == len(counts) - 1 - place]
        rank = len(scores) - (k - above) + 1
    return scores.kthvalue(rank, dim=-1, keepdim=True).values


def rows(scores_OI: Tensor, density: float) -> Tensor:
    """Each row keeps the same number of its own best."""
    return topk(scores_OI, keep_count(scores_OI.shape[-1], density))


def layer(scores_OI: Tensor, density: float) -> Tensor:
    """The whole matrix competes together."""
    return topk(scores_OI.flatten(), keep_count(scores_OI.numel(), density)).view(scores_OI.shape)


def n_of_m(scores_OI: Tensor, n: int, m: int) -> Tensor:
    """Of every m consecutive inputs of a row, the n best."""
    return topk(scores_OI.unflatten(-1, (-1, m)), n).flatten(-2)


def tiles(scores_OI: Tensor, r: int, c: int) -> Tensor:
    """Sum of the scores of each r x c block: [O/r, I/c]."""
    o, i = scores_OI.shape
    return scores_OI.view(o // r, r, i // c, c).sum(dim=(1, 3))


def blocks(scores_OI: Tensor, r: int, c: int, density: float, *, per_row: bool = False) -> Tensor:
    """Whole r x c blocks kept or dropped by their summed score, over the matrix or within each row of blocks."""
    chosen = (rows if per_row else layer)(tiles(scores_OI, r, c), density)
    return chosen.repeat_interleave(r, 0).repeat_interleave(c, 1)


def above(scores: Tensor, threshold: float | Tensor) -> Tensor:
    """Everything strictly greater than the threshold."""
    _check(scores)
    return scores > threshold


def kth_largest_streamed(parts: Callable[[], Iterable[Tensor]], k: int) -> float:
    """The k-th largest of many non-negative tensors without ever holding them together.

    Non-negative floats order like their bit patterns, so two passes of a 65,536-bin histogram (upper, then lower 16
    bits) find the value exactly; `parts()` is iterated twice.

    Raises:
        PumiceError: a negative or NaN score.
    """

    def histogram(bits: Tensor) -> Tensor:
        return torch.bincount(bits, minlength=1 << 16)

    def bit_patterns() -> Iterable[Tensor]:
        for part in parts():
            flat = part.detach().float().flatten()
            if not bool((flat >= 0).all()):
                raise PumiceError("global selection needs scores that are not negative and not NaN.")
            yield (flat + 0.0).view(torch.int32)

    def pick(counts: Tensor, k: int) -> tuple[int, int]:
        from_top = counts.flip(0).cumsum(0)
        index = int(torch.searchsorted(from_top, torch.tensor(k)))
        before = int(from_top[index - 1]) if index else 0
        return (1 << 16) - 1 - index, k - before

    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for bits in bit_patterns():
        counts += histogram(bits >> 16)
    if k < 1 or k > int(counts.sum()):
        raise PumiceError(f"k={k} is outside 1..{int(counts.sum())}, the number of scores.")
    high, k = pick(counts, k)
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for bits in bit_patterns():
        counts += histogram(bits[(bits >> 16) == high] & 0xFFFF)
    low, _ = pick(counts, k)
    return torch.tensor((high << 16) | low, dtype=torch.int32).view(torch.float32).item()


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest of each row, largest first; which of equal ones is PyTorch's choice.

    Raises:
        PumiceError: NaN among the scores.
    """
    if not torch.compiler.is_compiling():
        _check(scores)
    return scores.topk(k, dim=-1)


def best_of_groups(priority_A: Tensor, group_A: Tensor, keep: int | Tensor) -> Tensor:
    """Mask [A] of the `keep` largest priorities within each group (a number for each, or one for all); earlier ones
    win at ties.
    """
    order_A = torch.argsort(priority_A, descending=True, stable=True)
    order_A = order_A[torch.argsort(group_A[order_A], stable=True)]
    sorted_A = group_A[order_A]
    place_A = torch.arange(group_A.shape[0], device=group_A.device)
    rank_A = place_A - torch.searchsorted(sorted_A, sorted_A)
    room = keep[sorted_A] if isinstance(keep, Tensor) else keep
    return torch.empty_like(group_A, dtype=torch.bool).scatter_(0, order_A, rank_A < room)
