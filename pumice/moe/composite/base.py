"""What every layer that is built of MoE layers is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pumice.moe.layer import MoE
from pumice.moe.routing import RouteContext


class Layered(nn.Module):
    """Base of layers around one or several `MoE`: `Kind(d_model, d_ff, experts, moe, *, option=…)`.

    `moe` are further arguments of the MoE layers inside; losses and statistics are theirs.
    """

    def forward(self, x: Tensor, context: RouteContext | None = None) -> Tensor:
        """[…, D] to the same shape."""
        raise NotImplementedError

    def inner(self) -> list[tuple[str, MoE]]:
        """The MoE layers inside, with their names."""
        return [(name, one) for name, one in self.named_modules() if isinstance(one, MoE)]

    @property
    def aux_loss(self) -> Tensor:
        """Sum of the weighted losses of all of them in the last forward pass."""
        return torch.stack([one.aux_loss for _, one in self.inner()]).sum()

    def statistics(self) -> dict[str, dict[str, float]]:
        """What each one's last plan says of itself."""
        return {name: one.statistics() for name, one in self.inner()}
