"""Optimal BERT Surgeon score. Shapes: O outputs, I inputs, N gradients, K blocks of a row, B weights of a block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.core.errors import PumiceError
from pumice.core.registry import scorer
from pumice.core.stats import Stats

CHUNK_BYTES = 1 << 28
"""Blocks of Fisher information held at a time."""


@scorer("obert", simpler="fisher", key="obert", paper="arXiv:2203.07259", needs=("gradients",))
def obert(
    w_OI: Tensor,
    stats: Stats,
    *,
    block: Annotated[int, "neighbouring weights of a row whose interplay is kept"] = 50,
    damp: Annotated[float, "λ as a share of the mean squared gradient of the layer"] = 0.001,
    diagonal: Annotated[float, "share of every weight's own squared gradient added to its λ"] = 3.0,
) -> Tensor:
    """w²/(2[F⁻¹]ⱼⱼ): the rise of the loss once the weights of the same block have made up for the removed one (oBERT).

    F = λI + 1/N Σ g gᵀ over N gradients, cut into blocks of B neighbouring weights. The score estimates the loss of the
    model, so that it may be compared over layers. With the recovery `obert` whole groups are judged together where the
    pattern wants groups.

    Differs from the paper: blocks begin anew with each row (its last one may be shorter), each is factorised at once
    instead of being updated gradient by gradient (the same inverse, without its rounding), and λ is relative to the
    layer, since the paper's 1e-7 belongs to its own loss and batch. `diagonal` (0 in the paper) weakens what the few
    gradients say of pairs of weights; with about as many gradients as a block has weights that is mostly noise. The
    paper prunes step by step with retraining between; this is one step.
    """
    scores = torch.empty_like(w_OI)
    for rows, w_KB, inverse_KBB in inverse_blocks(w_OI, stats["gradients"], block, damp, diagonal):
        part = w_KB.square() / (2 * torch.diagonal(inverse_KBB, dim1=-2, dim2=-1))
        scores[rows] = part.flatten(1)[:, : w_OI.shape[1]]
    return scores


def inverse_blocks(
    w_OI: Tensor, gradients_ONI: Tensor, block: int, damp: float, diagonal: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows at a time: the slice, its weights [o, K, B] and the inverse Fisher blocks [o, K, B, B].

    The last block of a row is filled up with zero weights that no gradient reaches.

    Raises:
        PumiceError: `block` below 1, `diagonal` below 0, or `damp` not above 0 (F is singular without it).
    """
    if block < 1:
        raise PumiceError(f"block={block} must be at least 1.")
    if not damp > 0:
        raise PumiceError(f"damp={damp} must be above 0: {gradients_ONI.shape[1]} gradients leave F singular.")
    if not diagonal >= 0:
        raise PumiceError(f"diagonal={diagonal} must not be negative.")
    o, n, i = gradients_ONI.shape
    block = min(block, i)
    square = float(gradients_ONI.square().mean())
    lam = damp * square if square > 0 else 1.0
    eye = torch.eye(block, dtype=w_OI.dtype, device=w_OI.device) * lam
    step = max(1, CHUNK_BYTES // (4 * block * (i + block)))
    for start in range(0, o, step):
        rows = slice(start, min(start + step, o))
        g_oKNB = _blocked(gradients_ONI[rows], block).movedim(1, 2)
        fisher = g_oKNB.mT @ g_oKNB / n + eye
        own = torch.diagonal(fisher, dim1=-2, dim2=-1)
        own += diagonal * g_oKNB.square().mean(-2)
        yield rows, _blocked(w_OI[rows], block), torch.cholesky_inverse(torch.linalg.cholesky(fisher))


def _blocked(x: Tensor, block: int) -> Tensor:
    """[..., I] as [..., K, B], filled up with zeros."""
    return F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
