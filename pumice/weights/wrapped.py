"""A linear layer between two block-diagonal ones, the module that rewrites of a weight as A·S·B give.

Shapes: R rows of x, O outputs, I inputs, K blocks of B x B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError


def block_matmul(x: Tensor, blocks_KBB: Tensor) -> Tensor:
    """x [..., K·B] times the transpose of a block-diagonal matrix: every block reads and writes its own B numbers."""
    k, b, _ = blocks_KBB.shape
    rows = x.reshape(-1, k, b).transpose(0, 1)
    return torch.bmm(rows, blocks_KBB.mT).transpose(0, 1).reshape(x.shape)


class WrappedLinear(nn.Module):
    """`y = A S B x + b` with A and B block-diagonal and S an ordinary or sparse linear layer (`core`).

    It is a module of ordinary parts: `pack` finds and packs the core, `save` stores it in its smallest layout and
    `left`, `right` plainly, and `load` puts the wrapper back from its entry in config.json. The wrappers cost
    (O·B_left + I·B_right) numbers and as many multiplications per row, and two small batched matrix products per call.
    `weight` is the product written out, computed at each access.
    """

    def __init__(self, left_KBB: Tensor, core: nn.Module, right_KBB: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.left = nn.Parameter(left_KBB.detach(), requires_grad=False)
        self.core = core
        self.right = nn.Parameter(right_KBB.detach(), requires_grad=False)
        kept = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", kept)
        self.out_features, self.in_features = _width(left_KBB), _width(right_KBB)
        shape = (getattr(core, "out_features", None), getattr(core, "in_features", None))
        if shape != (self.out_features, self.in_features):
            raise PumiceError(
                f"core is {shape[0]} x {shape[1]} and its wrappers are for {self.out_features} x {self.in_features}: "
                "the blocks must cover the layer."
            )

    @classmethod
    def around(cls, module: nn.Module, entry: Mapping[str, Any], name: str = "the layer") -> WrappedLinear:
        """An unfilled wrapper in the place of a `Linear`, as `describe` says, for values that are still to be loaded.

        Raises:
            PumiceError: the module is no `Linear`, or the blocks do not divide it.
        """
        if type(module) is not nn.Linear:
            raise PumiceError(f"{name} is stored as a wrapped Linear and is a {type(module).__name__} here.")
        o, i, b = module.out_features, module.in_features, (int(entry["left"]), int(entry["right"]))
        if b[0] < 1 or b[1] < 1 or o % b[0] or i % b[1]:
            raise PumiceError(f"{name} is {o} x {i} here, which blocks of {b[0]} and {b[1]} do not divide.")
        like = {"dtype": module.weight.dtype, "device": module.weight.device}
        left, right = torch.empty(o // b[0], b[0], b[0], **like), torch.empty(i // b[1], b[1], b[1], **like)
        core = nn.Linear(i, o, bias=False, **like)
        core.weight.requires_grad_(False)
        return cls(left, core, right, module.bias).train(module.training)

    def describe(self) -> dict[str, int]:
        """Its entry in config.json: the block sizes."""
        return {"left": self.left.shape[-1], "right": self.right.shape[-1]}

    @property
    def weight(self) -> Tensor:
        core = self.core.weight
        assert isinstance(core, Tensor)
        half = block_matmul(core.float().t(), self.left.float()).t()
        return block_matmul(half, self.right.float().mT).to(self.left.dtype)

    def to_dense(self) -> nn.Linear:
        """One ordinary layer with the product as its weight."""
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight.detach().contiguous(), requires_grad=False)
        dense.bias = self.bias
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        y = block_matmul(self.core(block_matmul(x, self.right)), self.left)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        k, r = self.describe().values()
        return f"in_features={self.in_features}, out_features={self.out_features}, left blocks {k}, right blocks {r}"


def _width(blocks_KBB: Tensor) -> int:
    return blocks_KBB.shape[0] * blocks_KBB.shape[1]
