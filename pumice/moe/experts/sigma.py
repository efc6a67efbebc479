"""Two-layer experts that start like the slices of one dense layer: σ-MoE.

Legend: E experts, F hidden width, D model width.
"""

from __future__ import annotations

from typing import Annotated

from torch import nn

from pumice.core.registry import experts
from pumice.moe.experts.mlp import MLP


@experts("sigma", key="sigma-moe-pkm-framework", paper="arXiv:2310.10837")
class SigmaMLP(MLP):
    """Kind `mlp` whose initial weights are those of a dense layer of width E · F: the sum over all experts counts.

    Normal with standard deviation scale / √D going up and scale / √(E F) coming down; `scale` is √(2 / layers) in the
    paper, as in its dense baseline (from memory).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        experts: int,
        *,
        activation: Annotated[str, "silu, gelu, gelu_tanh, relu, relu2, sigmoid"] = "relu",
        scale: Annotated[float, "factor on both standard deviations"] = 1.0,
    ) -> None:
        super().__init__(d_model, d_ff, experts, activation=activation)
        nn.init.normal_(self.up_proj, std=scale * d_model**-0.5)
        nn.init.normal_(self.down_proj, std=scale * (experts * d_ff) ** -0.5)
