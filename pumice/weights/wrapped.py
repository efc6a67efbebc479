"""Modules that take another's place and are put back when a checkpoint is loaded; among them linear layers with
something cheap around them, which rewrites of a weight give.

Shapes: R rows of x, O outputs, I inputs, K blocks of B x B.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pumice.core.errors import PumiceError


def block_matmul(x: Tensor, blocks_KBB: Tensor) -> Tensor:
    """x [..., K·B] times the transpose of a block-diagonal matrix: every block reads and writes its own B numbers."""
    k, b, _ = blocks_KBB.shape
    rows = x.reshape(-1, k, b).transpose(0, 1)
    return torch.bmm(rows, blocks_KBB.mT).transpose(0, 1).reshape(x.shape)


class Substitute(nn.Module, ABC):
    """Base of the modules that take an ordinary module's place and are made of ordinary or sparse parts.

    `save` stores the parts, each in its smallest layout, and `load` puts the substitute back from its entry in
    config.json.
    """

    kind: ClassVar[str]
    stands_for: ClassVar[str]
    """What it takes the place of, for messages."""

    @classmethod
    @abstractmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether it can stand in a module's place."""

    @classmethod
    @abstractmethod
    def around(cls, module: Any, entry: Mapping[str, Any], name: str) -> Self:
        """An unfilled one in the place of `module`, as `describe` says, for values that are still to be loaded."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Its entry in config.json."""

    @abstractmethod
    def dense_tensors(self) -> dict[str, Tensor]:
        """The state of the ordinary module that it stands for, computed at each call."""

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """That ordinary module."""


class Wrapper(Substitute):
    """Base of the substitutes of a `Linear` with a linear layer `core`, ordinary or sparse, inside.

    `pack` finds and packs the core. `weight` is the weight that they stand for, computed at each access.
    """

    stands_for = "Linear"
    core: nn.Module
    bias: nn.Parameter | None
    in_features: int
    out_features: int

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        return type(module) is nn.Linear

    @abstractmethod
    def product(self) -> Tensor:
        """The weight that it stands for, [O, I]."""

    @property
    def weight(self) -> Tensor:
        return self.product()

    def dense_tensors(self) -> dict[str, Tensor]:
        bias = {} if self.bias is None else {"bias": self.bias.detach()}
        return {"weight": self.product().detach().contiguous(), **bias}

    def to_dense(self) -> nn.Linear:
        """One ordinary layer with the product as its weight."""
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.product().detach().contiguous(), requires_grad=False)
        dense.bias = self.bias  # type: ignore[assignment]
        return dense.train(self.training)


def wrap_around(module: nn.Module, entry: Mapping[str, Any], name: str) -> Substitute:
    """The unfilled substitute that an entry of config.json describes.

    Raises:
        PumiceError: the kind is unknown, the module is nothing that it stands for, or it does not fit.
    """
    cls = {one.kind: one for one in _kinds(Substitute)}.get(entry.get("kind", ""))
    if cls is None:
        raise PumiceError(
            f"{name} is wrapped as {entry.get('kind')!r}, which this Pumice does not know: upgrade pumice."
        )
    if not cls.takes(module):
        raise PumiceError(f"{name} is stored as a wrapped {cls.stands_for} and is a {type(module).__name__} here.")
    return cls.around(module, entry, name).train(module.training)


def _kinds(cls: type[Substitute]) -> Iterator[type[Substitute]]:
    for one in cls.__subclasses__():
        if "kind" in one.__dict__:
            yield one
        yield from _kinds(one)


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
    def around(cls, module: nn.Linear, entry: Mapping[str, Any], name: str) -> Self:
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
    def around(cls, module: nn.Linear, entry: Mapping[str, Any], name: str) -> Self:
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
