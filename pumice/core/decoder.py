"""A decoder as the op "decoder" takes it: its matrices, whatever they are stored in, and what lies between them.

A layer is `x += o(attention(rope(q(n1(x)), k(n1(x))), v(n1(x))))`, then `x += down(silu(gate(n2(x))) * up(n2(x)))`, with root
mean square norms n1 and n2; a further norm follows the last layer. That is Llama, and what took it over: Mistral, Qwen2
(biases of q, k, v), Qwen3 (a norm of each head of q and k).
Shapes: D model width, H query heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pumice.core.dispatch import Stored

PARTS = ("q", "k", "v", "o", "gate", "up", "down")
"""The matrices of a layer, in the order in which they are used."""


@dataclass(frozen=True)
class DecoderLayer:
    """One layer: `parts` maps each of `PARTS` to its matrix and bias; norms are [D], those of heads [d] or None."""

    parts: Mapping[str, tuple[Stored, Tensor | None]]
    input_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


@dataclass(frozen=True)
class Decoder:
    """All layers, and the norm behind them; `scale` is that of the scores, `eps` that of every norm."""

    layers: tuple[DecoderLayer, ...]
    norm: Tensor
    heads: int
    kv_heads: int
    head: int
    eps: float
    scale: float
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """D."""
        return self.norm.numel()

    @property
    def inner(self) -> int:
        """Width of the multilayer perceptron."""
        return self.layers[0].parts["gate"][0].shape[0]
