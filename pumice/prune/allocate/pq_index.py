"""PQ Index: how compressible a layer's weights are, from two norms (SAP)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.registry import allocation
from pumice.prune.allocate.base import Layers, exact, share


def pq_index(w: Tensor, p: float = 0.5, q: float = 1.0) -> float:
    """1 − d^(1/q−1/p)·‖w‖_p/‖w‖_q of the d weights that are not zero: 0 if all are equally large, near 1 if few matter.

    Does not change with the scale of w. 0 for a tensor without weights.
    """
    values = w[w != 0].double().abs()
    d = values.numel()
    if d == 0:
        return 0.0
    values = values / values.max()
    ratio = values.pow(p).sum().pow(1 / p) / values.pow(q).sum().pow(1 / q)
    return 1 - d ** (1 / q - 1 / p) * float(ratio)


def keep_bound(w: Tensor, p: float = 0.5, q: float = 1.0, eta: float = 0.0) -> float:
    """r = d·(1+η)^(−q/(q−p))·(1−PQI)^(pq/(q−p)): at least so many of the d nonzero weights are to be kept.

    If the weights beyond the r largest hold no more than η times the p-norm (to the p) of those, no r is smaller.
    """
    d = int(torch.count_nonzero(w))
    return d * (1 + eta) ** (-q / (q - p)) * (1 - pq_index(w, p, q)) ** (p * q / (q - p))


@allocation("pq-index", key="sap-pq-index", paper="arXiv:2302.05601")
def pq_index_allocation(
    layers: Layers,
    density: float,
    *,
    p: Annotated[float, "lower norm, 0 < p < q"] = 0.5,
    q: Annotated[float, "upper norm"] = 1.0,
    eta: Annotated[float, "η: how much of the norm the pruned weights may hold"] = 0.0,
    beta: Annotated[float, "largest share of a layer that is pruned"] = 0.9,
) -> dict[str, float]:
    """Layers whose weights are more compressible by the PQ Index lose more: share pruned = min(γ·(1 − r/d), β).

    d counts a layer's weights that are not zero, r is the bound on what must be kept. In the paper (SAP) γ is a setting;
    here it is solved for, so that the model keeps `density` exactly. With p = 1/2 and q = 1, and η = 0, the share pruned
    is proportional to the PQ Index itself.

    One-shot: the paper's loop (train, measure, prune the smallest weights, rewind to the initial weights, repeat), in
    which the total density follows from the index, is not here; nor is its scope of single neurons.

    At 70 % on stories15M it helps SparseGPT a little and Wanda not at all; OWL is better with both (docs/quality.md).

    Raises:
        PumiceError: not 0 < p < q, η < 0, β outside (0, 1], or β too small for the density.
    """
    if not 0 < p < q:
        raise PumiceError(f"allocation pq-index: p={p} and q={q} must be 0 < p < q.")
    if eta < 0 or not 0 < beta <= 1:
        raise PumiceError(f"allocation pq-index: eta={eta} must not be negative, and beta={beta} lie in (0, 1].")
    sizes = {view.name: view.numel for view in layers.views}
    zeros, excess = {}, {}
    for view, w, _ in layers.read():
        alive = int(torch.count_nonzero(w))
        zeros[view.name] = view.numel - alive
        excess[view.name] = max(0.0, alive - keep_bound(w, p, q, eta))
    # Weights that are zero already are the first to go and count as pruned.
    caps = {name: zeros[name] + beta * (sizes[name] - zeros[name]) for name in sizes}
    total = sum(sizes.values())
    gone = total - select.keep_count(total, density)
    if gone > sum(caps.values()):
        raise PumiceError(
            f"allocation pq-index: beta={beta} prunes at most {sum(caps.values()) / total:.3f} of all weights, density="
            f"{density} wants {gone / total:.3f}: use a larger beta."
        )
    rest = gone - sum(zeros.values())
    if rest <= 0:
        return exact({name: sizes[name] - zeros[name] for name in sizes}, layers, density)
    pruned = share(excess, {name: caps[name] - zeros[name] for name in sizes}, rest)
    return exact({name: sizes[name] - zeros[name] - pruned[name] for name in sizes}, layers, density)
