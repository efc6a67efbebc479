"""MoE layers of a whole model: their losses, statistics and idle experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pumice.moe.layer import MoE


def layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    """Every MoE layer with its name, which is noted on the layer for its messages."""
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            module.name = name
            yield name, module


def aux_loss(model: nn.Module) -> Tensor:
    """Sum of the auxiliary losses of all MoE layers after a forward pass: add it to the loss."""
    losses = [layer.aux_loss for _, layer in layers(model)]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def statistics(model: nn.Module) -> dict[str, dict[str, float]]:
    """What each layer's last plan says of itself, by the layer's name."""
    return {name: layer.statistics() for name, layer in layers(model)}


def unused(model: nn.Module) -> list[str]:
    """Names of the experts that have had no token since they were made or counted anew: `blocks.3.moe expert 5`."""
    return [f"{name} expert {expert}".strip() for name, layer in layers(model) for expert in layer.unused()]
