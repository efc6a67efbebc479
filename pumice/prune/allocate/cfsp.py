"""CFSP's coarse stage: blocks are weighed by how far they turn the hidden state."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from pumice.core.registry import allocation
from pumice.prune.allocate.base import Block, Layers, proportional


def angle(x_TD: Tensor, y_TD: Tensor) -> Tensor:
    """Angle between two rows as a share of a half turn, [T]; 0 where they point the same way."""
    cosine = torch.nn.functional.cosine_similarity(x_TD.double(), y_TD.double(), dim=-1)
    return cosine.clamp(-1, 1).arccos() / math.pi


@allocation("cfsp", key="cfsp", paper="arXiv:2409.13199", needs=("states",), streams=True)
def cfsp(
    layers: Layers,
    density: float,
    *,
    sharpness: Annotated[float, "a: how strongly densities follow the importance"] = 13.1,
) -> dict[str, float]:
    """Blocks that turn the hidden state more keep more: density ∝ sigmoid(a·(I − mean I)), I = mean angle / π.

    I is arccos of the cosine between a block's input and its output, averaged over the tokens. All layers of a block have
    one density; it is capped at 1 and what is cut off goes to the others, so that the budget is hit exactly. One pass over
    the calibration data. A part of the model whose output has another width than its input (a lone layer) has no angle and
    counts as average.

    This is the coarse stage of CFSP alone, for pruning weights anywhere; its fine stage removes channels. The authors'
    program takes a = 1 times the sum of the angles over 128 windows of 1024 tokens, divided by 10⁴: times 13.1 of their
    mean. Where a block would keep more than everything, it draws all densities towards their mean instead of capping.
    """
    importance: dict[str, float] = {}

    def visit(block: Block) -> None:
        total, count = 0.0, 0
        for x, y in block.states():
            if x.shape == y.shape and x.dim() == 2:
                total += float(angle(x, y).sum())
                count += len(x)
        if count:
            importance[block.name] = total / count

    layers.walk(visit)
    mean = sum(importance.values()) / max(len(importance), 1)
    weights = {
        view.name: 1 / (1 + math.exp(-sharpness * (importance.get(layers.blocks[view.name], mean) - mean)))
        for view in layers.views
    }
    return proportional(weights, layers, density)
