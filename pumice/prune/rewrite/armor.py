"""ARMOR: an N:M core between two block-diagonal matrices that make up for what the pattern took.

Shapes: O outputs, I inputs; A has J blocks of P x P, B has K blocks of Q x Q; C choices of N in a group of M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.registry import rewrite
from pumice.core.stats import Stats
from pumice.prune.layer import Selector
from pumice.weights.patterns.nm import NOfM
from pumice.weights.wrapped import WrappedLinear

PROXIMAL = 1e-6
"""Weight of the old value in each least-squares step, as a share of the mean curvature: the steps stay defined."""
MOST_CHOICES = 100


@rewrite("armor", key="armor", paper="arXiv:2510.05528", needs=("input_sqnorm",), patterns=("nm",))
def armor(
    module: nn.Linear,
    w_OI: Tensor,
    stats: Stats,
    select: Selector,
    *,
    block: Annotated[
        int, "largest size of the wrappers' blocks; the largest divisor of the layer's width is taken"
    ] = 64,
    rounds: Annotated[int, "rounds of updates of A, B, the kept weights and the mask"] = 50,
    tolerance: Annotated[float, "stop when a round lowers the error by less than this share"] = 1e-4,
) -> nn.Module:
    """W ≈ A·S·B with S in an N:M pattern and A, B block-diagonal, by block coordinate descent (ARMOR).

    Minimises ‖(W̄ − A S B)·diag(‖x‖)‖², W̄ being W with its columns and then its rows scaled to norm one (NoWag). Starts
    from A = B = 1 and the mask of the largest W̄²‖x‖² (NoWag-P), and no update can raise the error: A and B by least
    squares, the kept weights by a gradient step of the best length, and in every pair of blocks the group with the
    largest gradient chooses its N positions and values anew, the best of all choices. The norms go into A and B, so
    that the layer that runs is a `WrappedLinear`.

    Differs from the paper, which updates A, B and S together by Adam: exact steps need no rate and never go up.

    Raises:
        PumiceError: no N:M pattern, or a width that no block of a multiple of M divides.
    """
    pattern: Any = select.pattern
    if not isinstance(pattern, NOfM) or math.comb(pattern.m, pattern.n) > MOST_CHOICES:
        raise PumiceError(f"pattern={pattern.text!r}: armor needs a small N:M pattern such as 2:4.")
    if rounds < 0:
        raise PumiceError(f"rounds={rounds} must not be negative.")
    o, i = w_OI.shape
    p, q = _divisor(o, block, 1), _divisor(i, block, pattern.m)
    problem = Factors.start(w_OI, stats["input_sqnorm"], select, p, q)
    error = problem.error()
    for _ in range(rounds):
        problem.round()
        before, error = error, problem.error()
        if not error < before * (1 - tolerance):
            break
    left, core, right = problem.finish()
    layer = nn.Linear(i, o, bias=False, device=w_OI.device, dtype=module.weight.dtype)
    layer.weight = nn.Parameter(core.to(module.weight.dtype), requires_grad=False)
    return WrappedLinear(left.to(layer.weight), layer, right.to(layer.weight), module.bias).train(module.training)


def _divisor(width: int, block: int, multiple: int) -> int:
    for size in range(min(block, width), 0, -1):
        if width % size == 0 and size % multiple == 0:
            return size
    raise PumiceError(f"block={block}: no block of at most that, a multiple of {multiple}, divides the width {width}.")


@dataclass
class Factors:
    """The blocks of W̄·diag(‖x‖) and of its factors; block (j, k) of the product is A_j S_jk B_k."""

    goal_JKPQ: Tensor
    a_JPP: Tensor
    core_JKPQ: Tensor
    mask_JKPQ: Tensor
    b_KQQ: Tensor
    """With diag(‖x‖) multiplied in."""
    outer_O: Tensor
    inner_I: Tensor
    """What A's rows and B's columns are multiplied with in the end."""
    n: int
    m: int

    @classmethod
    def start(cls, w_OI: Tensor, sqnorm_I: Tensor, select: Selector, p: int, q: int) -> Factors:
        pattern: Any = select.pattern
        assert isinstance(pattern, NOfM)
        columns_I = _nonzero(w_OI.norm(dim=0))
        rows_O = _nonzero((w_OI / columns_I).norm(dim=1))
        normed = w_OI / columns_I / rows_O[:, None]
        size_I = sqnorm_I.sqrt()
        # Inputs that were never seen still have to come out finite.
        size_I = size_I.clamp(min=1e-4 * float(size_I.max()) if size_I.any() else 1.0)
        mask = select.whole((normed * size_I).square())

        def blocked(x: Tensor) -> Tensor:
            return x.unflatten(1, (-1, q)).unflatten(0, (-1, p)).transpose(1, 2).contiguous()

        a = torch.eye(p).to(w_OI).repeat(len(w_OI) // p, 1, 1)
        b = torch.diag_embed(size_I.view(-1, q))
        inner = columns_I / size_I
        parts = (blocked(normed * size_I), a, blocked(normed * mask), blocked(mask), b)
        return cls(*parts, rows_O, inner, pattern.n, pattern.m)

    def product(self) -> Tensor:
        return self.a_JPP[:, None] @ self.core_JKPQ @ self.b_KQQ

    def residual(self) -> Tensor:
        return self.goal_JKPQ - self.product()

    def error(self) -> float:
        return float(self.residual().square().sum())

    def round(self) -> None:
        """Every update once; none raises the error."""
        self.update_a()
        self.update_b()
        self.update_core()
        self.update_groups()

    def update_a(self) -> None:
        right = self.core_JKPQ @ self.b_KQQ
        gram, pull = (right @ right.mT).sum(1), (self.residual() @ right.mT).sum(1)
        self.a_JPP = self.a_JPP + _solve(gram, pull.mT).mT

    def update_b(self) -> None:
        left = self.a_JPP[:, None] @ self.core_JKPQ
        gram, pull = (left.mT @ left).sum(0), (left.mT @ self.residual()).sum(0)
        self.b_KQQ = self.b_KQQ + _solve(gram, pull)

    def gradient(self) -> Tensor:
        """Half the negative gradient of the error by S, mask or not."""
        return self.a_JPP.mT[:, None] @ self.residual() @ self.b_KQQ.mT

    def update_core(self) -> None:
        direction = self.gradient() * self.mask_JKPQ
        image = self.a_JPP[:, None] @ direction @ self.b_KQQ
        # A length for every block, as they do not meet in the product.
        square, curved = direction.square().sum((2, 3), keepdim=True), image.square().sum((2, 3), keepdim=True)
        self.core_JKPQ = self.core_JKPQ + direction * torch.where(curved > 0, square / curved.clamp(min=1e-30), 0)

    def update_groups(self) -> None:
        """In every block the group of largest gradient takes its best positions and values."""
        j, k, _, q = self.core_JKPQ.shape
        groups = self.gradient().unflatten(-1, (-1, self.m)).abs().sum(-1).flatten(2)
        at = groups.argmax(-1)
        row, first = at // (q // self.m), at % (q // self.m) * self.m
        rows_b = torch.arange(j, device=at.device)[:, None].expand(j, k)
        columns_b = torch.arange(k, device=at.device).expand(j, k)
        a_JKP = self.a_JPP[rows_b, :, row]
        spans = first[..., None] + torch.arange(self.m, device=at.device)
        b_JKMQ = self.b_KQQ[columns_b[..., None], spans]
        old = self.core_JKPQ[rows_b[..., None], columns_b[..., None], row[..., None], spans]
        rest = self.residual() + a_JKP[..., :, None] * (old[..., None, :] @ b_JKMQ)
        # a·v: the part of the rest that this row of the block can write.
        seen = ((a_JKP[..., None, :] @ rest) @ b_JKMQ.mT)[..., 0, :]
        gram = b_JKMQ @ b_JKMQ.mT * a_JKP.square().sum(-1)[..., None, None]
        values, kept = self._choose(gram, seen, old)
        self.core_JKPQ[rows_b[..., None], columns_b[..., None], row[..., None], spans] = values
        self.mask_JKPQ[rows_b[..., None], columns_b[..., None], row[..., None], spans] = kept

    def _choose(self, gram: Tensor, seen: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Values and mask of the best choice of N in a group; the old ones where none is better."""
        best = self._value(gram, seen, old)
        values, kept = old, old != 0
        for choice in combinations(range(self.m), self.n):
            index = list(choice)
            inner = gram[..., index, :][..., index]
            found = torch.zeros_like(old)
            found[..., index] = _solve(inner, seen[..., index, None])[..., 0]
            value = self._value(gram, seen, found)
            better = (value < best)[..., None]
            values, best = torch.where(better, found, values), torch.minimum(best, value)
            here = torch.zeros(self.m, dtype=torch.bool, device=old.device)
            here[index] = True
            kept = torch.where(better, here, kept)
        return values, kept

    @staticmethod
    def _value(gram: Tensor, seen: Tensor, values: Tensor) -> Tensor:
        """The error of a block, but for a constant, with these values in its group."""
        return (values * ((gram @ values[..., None])[..., 0] - 2 * seen)).sum(-1)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, S [O, I] and B for W itself."""
        left = self.a_JPP * self.outer_O.view(self.a_JPP.shape[0], -1, 1)
        right = self.b_KQQ * self.inner_I.view(self.b_KQQ.shape[0], 1, -1)
        core = (self.core_JKPQ * self.mask_JKPQ).transpose(1, 2).flatten(2).flatten(0, 1)
        return left, core.contiguous(), right


def _nonzero(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, norm, 1)


def _solve(gram: Tensor, pull: Tensor) -> Tensor:
    """(G + a little of the identity)⁻¹·pull for a batch of G."""
    mean = torch.diagonal(gram, dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + eye * (PROXIMAL * mean + 1e-20), pull)
