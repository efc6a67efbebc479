"""OWL."""

from __future__ import annotations

from typing import Annotated

from pumice.core.errors import PumiceError
from pumice.core.registry import allocation
from pumice.prune.allocate.base import Layers


@allocation("owl", paper="arXiv:2310.05175", needs=("input_sqnorm",))
def owl(
    layers: Layers,
    density: float,
    *,
    lam: Annotated[float, "largest distance of a block's density from the mean"] = 0.08,
    threshold: Annotated[float, "an outlier is so many times the block's mean score"] = 5.0,
) -> dict[str, float]:
    """Blocks with more outliers of |W|·‖X‖ keep more: their share of outliers is mapped linearly onto density ± λ.

    One density for all layers of a block. Statistics come from the dense model. λ and M are those of the authors' LLaMA
    runs; the default of their program is M = 3, which is worse on SmolLM2.

    Raises:
        PumiceError: λ would push a block's density out of (0, 1].
    """
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for view, w, stats in layers.read():
        block = layers.blocks[view.name]
        metric = w.abs() * stats["input_sqnorm"].sqrt()
        sums[block] = sums.get(block, 0.0) + float(metric.double().sum())
        counts[block] = counts.get(block, 0) + metric.numel()
    outliers = dict.fromkeys(sums, 0)
    for view, w, stats in layers.read():
        block = layers.blocks[view.name]
        metric = w.abs() * stats["input_sqnorm"].sqrt()
        outliers[block] += int((metric > threshold * sums[block] / counts[block]).sum())
    share = {block: outliers[block] / counts[block] for block in sums}
    low, high = min(share.values()), max(share.values())
    spread = {block: 2 * lam * (share[block] - low) / (high - low) if high > low else 0.0 for block in share}
    # Weighted by size, so that the whole model keeps what was asked even where blocks differ.
    total = sum(counts.values())
    mean = sum(spread[block] * counts[block] for block in spread) / total
    densities = {block: density + spread[block] - mean for block in spread}
    for block, value in densities.items():
        if not 0 < value <= 1:
            raise PumiceError(
                f"allocation owl: lam={lam} gives block {block} density {value:.3f}, outside (0, 1]: use a smaller lam."
            )
    return {view.name: densities[layers.blocks[view.name]] for view in layers.views}
