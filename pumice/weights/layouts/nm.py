"""N of every M neighbours, with the kept positions as one short code per group."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from pumice.core.registry import layout
from pumice.weights.layouts.base import Layout, Packed, pack_bits, shape_fault, unpack_bits

FILLED = 1.1
"""Stored numbers a nonzero, up to which zeros count as N:M."""
USUAL_M = (4, 8, 16, 32)
# Up to here all positions of a pattern are looked up in a table, above it they are computed.
TABLE_LIMIT = 1 << 16


def code_bits(n: int, m: int) -> int:
    """Bits of one group's code."""
    return (math.comb(m, n) - 1).bit_length()


def _binomials(m: int, device: torch.device) -> Tensor:
    return torch.tensor([[math.comb(p, k) for k in range(m + 1)] for p in range(m)], dtype=torch.int64, device=device)


def rank(kept: Tensor) -> Tensor:
    """Number of each set of kept positions among all sets of its size: bool [..., m] -> int64 [...].

    The combinatorial number system: positions p_1 < ... < p_n have rank C(p_1, 1) + ... + C(p_n, n), which counts the
    n-subsets from 0 to C(m, n) - 1 without gaps.
    """
    m = kept.shape[-1]
    table = _binomials(m, kept.device)
    total = torch.zeros(kept.shape[:-1], dtype=torch.int64, device=kept.device)
    count = torch.zeros_like(total)
    for position in range(m):
        here = kept[..., position]
        count += here
        total += torch.where(here, table[position][count], 0)
    return total


def _unrank(ranks: Tensor, n: int, m: int) -> Tensor:
    table = _binomials(m, ranks.device)
    left = torch.full_like(ranks, n)
    ranks = ranks.clone()
    kept = torch.zeros((*ranks.shape, m), dtype=torch.bool, device=ranks.device)
    for position in reversed(range(m)):
        cost = table[position][left]
        here = (left > 0) & (ranks >= cost)
        kept[..., position] = here
        ranks -= torch.where(here, cost, 0)
        left -= here.to(left.dtype)
    return kept


def unrank(ranks: Tensor, n: int, m: int) -> Tensor:
    """Inverse of `rank`: int64 [...] -> bool [..., m] with n kept each."""
    if math.comb(m, n) <= TABLE_LIMIT:
        return _unrank(torch.arange(math.comb(m, n), device=ranks.device), n, m)[ranks]
    return _unrank(ranks, n, m)


def pack_codes(codes_OG: Tensor, bits: int) -> Tensor:
    """int64 codes [O, G] as uint8 [O, ceil(G bits / 8)]: each row starts at a byte, lowest bit first."""
    shifts = torch.arange(bits, dtype=torch.int64, device=codes_OG.device)
    return pack_bits(((codes_OG.unsqueeze(-1) >> shifts) & 1).flatten(1))


def unpack_codes(packed: Tensor, groups: int, bits: int) -> Tensor:
    """Inverse of `pack_codes`: int64 [O, groups]."""
    each = unpack_bits(packed, groups * bits).unflatten(-1, (groups, bits))
    codes = torch.zeros(each.shape[:-1], dtype=torch.int64, device=packed.device)
    for bit in range(bits):
        codes |= each[..., bit].to(torch.int64) << bit
    return codes


@layout("nm")
class NOfM(Layout):
    """N numbers of every M neighbouring inputs and a code that says which: two bits short of a bitmask and evenly long.

    Tensors: `values` [O, G n], G = I / m groups a row, positions ascending within a group; `codes` uint8
    [O, ceil(G b / 8)] with b = ceil(log2 C(m, n)) bits a group, lowest bit first, each row from a new byte. A group
    with fewer than n nonzeros fills up with explicit zeros at its first free positions. 2:4 in bf16 takes 54.7 % of
    the dense bytes.
    """

    examples: ClassVar = ({"n": 2, "m": 4}, {"n": 4, "m": 8}, {"n": 1, "m": 4})

    @staticmethod
    def refuse(w_OI: Tensor, **params: int) -> str | None:
        n, m = params["n"], params["m"]
        if not 1 <= n <= m <= 32:
            return f"n={n}, m={m} must satisfy 1 <= n <= m <= 32"
        if w_OI.shape[1] % m:
            return f"m={m} does not divide the width {w_OI.shape[1]}"
        most = _most(w_OI, m)
        return f"a group of {m} holds {most} nonzeros, more than n={n}" if most > n else None

    @staticmethod
    def candidates(w_OI: Tensor) -> list[dict[str, int]]:
        found = []
        for m in USUAL_M:
            # A few rows settle it for ordinary matrices, so that the full count is only made where it may pay.
            if w_OI.numel() and w_OI.shape[1] % m == 0 and _most(w_OI[:16], m) < m:
                most = max(_most(w_OI, m), 1)
                # Zeros anywhere leave no group full by chance; filled up, they would take more than under a bitmask.
                by_chance = most * (w_OI.numel() // m) > FILLED * int((w_OI != 0).sum())
                found += [{"n": most, "m": m}] if most < m and (most == 1 or not by_chance) else []
        return found

    @staticmethod
    def stored_bytes(w_OI: Tensor, **params: int) -> int:
        n, m = params["n"], params["m"]
        groups = w_OI.shape[1] // m
        return w_OI.shape[0] * (groups * n * w_OI.element_size() + math.ceil(groups * code_bits(n, m) / 8))

    @staticmethod
    def pack(w_OI: Tensor, **params: int) -> Packed:
        n, m = params["n"], params["m"]
        groups = w_OI.unflatten(-1, (w_OI.shape[1] // m, m))
        kept = groups != 0
        free = ~kept
        kept = kept | (free & (free.cumsum(-1, dtype=torch.int32) <= n - kept.sum(-1, keepdim=True)))
        # Adding zero turns the negative zeros among the fillers into positive ones.
        values = (groups[kept] + 0).view(w_OI.shape[0], w_OI.shape[1] // m * n)
        tensors = {"values": values, "codes": pack_codes(rank(kept), code_bits(n, m))}
        return Packed("nm", (w_OI.shape[0], w_OI.shape[1]), w_OI.dtype, tensors, {"n": n, "m": m})

    @staticmethod
    def unpack(packed: Packed) -> Tensor:
        n, m = packed.params["n"], packed.params["m"]
        values = packed.tensors["values"]
        codes = unpack_codes(packed.tensors["codes"], packed.shape[1] // m, code_bits(n, m))
        mask = unrank(codes, n, m).flatten(1)
        return torch.zeros(packed.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)

    @staticmethod
    def fault(packed: Packed) -> str | None:
        (o, i), n, m = packed.shape, packed.params.get("n", 0), packed.params.get("m", 0)
        if not 1 <= n <= m <= 32 or i % m:
            return f"n={n}, m={m} do not fit the width {i}"
        groups, bits = i // m, code_bits(n, m)
        wrong = shape_fault(
            packed,
            {
                "values": ((o, groups * n), (packed.dtype,)),
                "codes": ((o, math.ceil(groups * bits / 8)), (torch.uint8,)),
            },
        )
        if wrong or not o * groups:
            return wrong
        highest = int(unpack_codes(packed.tensors["codes"], groups, bits).amax())
        return None if highest < math.comb(m, n) else f"code {highest} stands for no choice of {n} from {m}"


def _most(w_OI: Tensor, m: int) -> int:
    """Nonzeros of the fullest group of m."""
    if not w_OI.numel():
        return 0
    return int((w_OI != 0).unflatten(-1, (w_OI.shape[1] // m, m)).sum(-1, dtype=torch.uint8).amax())
