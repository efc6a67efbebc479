"""Linear layers with something cheap around them, the modules that rewrites of a weight give.

Shapes: R rows of x, O outputs, I inputs, K blocks of B x B.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError


def block_matmul(x: Tensor, blocks_KBB: Tensor) -> Tensor:
    """x [..., K·B] times the transpose of a block-diagonal matrix: every block reads and writes its own B numbers."""
    k, b, _ = blocks_KBB.shape
    rows = x.reshape(-1, k, b).transpose(0, 1)
    return torch.bmm(rows, blocks_KBB.mT).transpose(0, 1).reshape(x.shape)


class Wrapper(nn.Module, ABC):
    """Base of the modules that take a `Linear`'s place with a linear layer `core`, ordinary or sparse, inside.

    They are modules of ordinary parts: `pack` finds and packs the core, `save` stores it in its smallest layout and
    the rest plainly, and `load` puts the wrapper back from its entry in config.json. `weight` is the weight that they
    stand for, computed at each access.
    """

    kind: ClassVar[str]
    core: nn.Module
    bias: nn.Parameter | None
    in_features: int
    out_features: int

    @classmethod
    @abstractmethod
    def around(cls, module: nn.Linear, entry: Mapping[str, Any], name: str) -> Wrapper:
        """An unfilled wrapper in the place of a `Linear`, as `describe` says, for values that are still to be loaded."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Its entry in config.json."""

    @abstractmethod
    def product(self) -> Tensor:
        """The weight that it stands for, [O, I]."""

    @property
    def weight(self) -> Tensor:
        return self.product()

    def to_dense(self) -> nn.Linear:
        """One ordinary layer with the product as its weight."""
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.product().detach().contiguous(), requires_grad=False)
        dense.bias = self.bias  # type: ignore[assignment]
        return dense.train(self.training)


def wrap_around(module: nn.Module, entry: Mapping[str, Any], name: str) -> Wrapper:
    """The unfilled wrapper that an entry of config.json describes.

    Raises:
        PumiceError: the module is no `Linear`, the kind is unknown, or it does not fit the layer.
    """
    if type(module) is not nn.Linear:
        raise PumiceError(f"{name} is stored as a wrapped Linear and is a {type(module).__name__} here.")
    kinds = {cls.kind: cls for cls in Wrapper.__subclasses__()}
    if entry.get("kind") not in kinds:
        raise PumiceError(
            f"{name} is wrapped as {entry.get('kind')!r}, which this Pumice does not know: upgrade pumice."
        )
    return kinds[entry["kind"]].around(module, entry, name).train(module.training)


def _empty_core(module: nn.Linear) -> nn.Linear:
    like = {"dtype": module.weight.dtype, "device": module.weight.device}
    core = nn.Linear(module.in_features, module.out_features, bias=False, **like)
    core.weight.requires_grad_(False)
    return core


def _kept(bias: Tensor | None) -> nn.Parameter | None:
    return bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)


class WrappedLinear(Wrapper):
    """`y = A S B x + b` with A and B block-diagonal and S an ordinary or sparse linear layer (`core`).

    The wrappers cost O·B_left + I·B_right numbers, as many multiplications per row, and two small batched matrix
    products per call.
    """

    kind = "block-diagonal"

    def __init__(self, left_KBB: Tensor, core: nn.Module, right_KBB: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.left = nn.Parameter(left_KBB.detach(), requires_grad=False)
        self.core = core
        self.right = nn.Parameter(right_KBB.detach(), requires_grad=False)
        self.register_parameter("bias", _kept(bias))
        self.out_features, self.in_features = _width(left_KBB), _width(right_KBB)
        shape = (getattr(core, "out_features", None), getattr(core, "in_features", None))
        if shape != (self.out_features, self.in_features):
            raise PumiceError(
                f"core is {shape[0]} x {shape[1]} and its wrappers are for {self.out_features} x {self.in_features}: "
                "the blocks must cover the layer."
            )

    @classmethod
    def around(cls, module: nn.Linear, entry: Mapping[str, Any], name: str) -> WrappedLinear:
        o, i, b = module.out_features, module.in_features, (int(entry["left"]), int(entry["right"]))
        if b[0] < 1 or b[1] < 1 or o % b[0] or i % b[1]:
            raise PumiceError(f"{name} is {o} x {i} here, which blocks of {b[0]} and {b[1]} do not divide.")
        like = {"dtype": module.weight.dtype, "device": module.weight.device}
        left, right = torch.empty(o // b[0], b[0], b[0], **like), torch.empty(i // b[1], b[1], b[1], **like)
        return cls(left, _empty_core(module), right, module.bias)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "left": self.left.shape[-1], "right": self.right.shape[-1]}

    def product(self) -> Tensor:
        core = self.core.weight
        assert isinstance(core, Tensor)
        half = block_matmul(core.float().t(), self.left.float()).t()
        return block_matmul(half, self.right.float().mT).to(self.left.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = block_matmul(self.core(block_matmul(x, self.right)), self.left)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        sizes = f"left blocks {self.left.shape[-1]}, right blocks {self.right.shape[-1]}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {sizes}"


class PermutedLinear(Wrapper):
    """`y = S x[order] + b`: a linear layer that reads its inputs in another order.

    The order costs I indices (int32) in memory and one gather of I numbers per row.
    """

    kind = "permuted"

    def __init__(self, order_I: Tensor, core: nn.Module, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("order", order_I.to(torch.int32))
        self.core = core
        self.register_parameter("bias", _kept(bias))
        self.in_features = len(order_I)
        self.out_features = int(core.out_features)  # type: ignore[arg-type]

    @classmethod
    def around(cls, module: nn.Linear, entry: Mapping[str, Any], name: str) -> PermutedLinear:
        del entry, name
        order = torch.empty(module.in_features, dtype=torch.int32, device=module.weight.device)
        return cls(order, _empty_core(module), module.bias)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def product(self) -> Tensor:
        core = self.core.weight
        assert isinstance(core, Tensor)
        return torch.empty_like(core).index_copy_(1, self.order.long(), core.detach())  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        y = self.core(x.index_select(-1, self.order))  # type: ignore[arg-type]
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _width(blocks_KBB: Tensor) -> int:
    return blocks_KBB.shape[0] * blocks_KBB.shape[1]
