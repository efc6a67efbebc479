"""Groups of units that can be taken out of a model: channels, heads, KV groups with all that belongs to them.

Shapes: U units of a group, n positions of a unit along an axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pumice.core.view import WeightView, module_views


@dataclass(frozen=True)
class Member:
    """One axis of one tensor that a group reaches into.

    Args:
        names: every name of the tensor (tied weights have several).
        axis: the axis to cut.
        index_Un: positions of each unit along that axis.
        role: "out" (its rows make the unit), "in" (its columns read it), "both", or "own" (biases, norms, running
            statistics, depthwise kernels: one value per position).
        size: extent of the axis.
    """

    names: tuple[str, ...]
    axis: int
    index_Un: Tensor = field(repr=False)
    role: str
    size: int

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def module(self) -> str:
        """Dotted name of the module that holds it."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Group:
    """Units that are alike, each with its members; removing a unit from all of them leaves an ordinary model.

    Args:
        name: its first reader (the module that consumes it), or its first maker.
        kind: "channel", or "head" (a head, or a KV group with the query heads that read it).
        units: how many there are.
        heads: query heads in a unit (0 for channels).
        block: the block that all members lie in, None where the group runs through several (a residual stream).
    """

    name: str
    kind: str
    units: int
    members: tuple[Member, ...]
    heads: int = 0
    block: str | None = None

    @property
    def makers(self) -> list[Member]:
        """Members whose rows make the units."""
        return [one for one in self.members if one.role in ("out", "both")]

    @property
    def readers(self) -> list[Member]:
        """Members whose columns read the units."""
        return [one for one in self.members if one.role in ("in", "both")]

    def tensors(self, model: nn.Module) -> Iterator[tuple[Member, Tensor]]:
        """Every member with its tensor as it is now."""
        for member in self.members:
            yield member, tensor_of(model, member.name)

    def cost(self, model: nn.Module) -> int:
        """Parameters that one unit takes (buffers not counted); exact for the next unit to be removed."""
        seen: dict[str, Tensor] = {}
        keep: dict[str, dict[int, int]] = {}
        for member, tensor in self.tensors(model):
            if isinstance(tensor, nn.Parameter):
                seen[member.name] = tensor
                keep.setdefault(member.name, {})[member.axis] = member.index_Un.shape[1]
        total = 0
        for name, tensor in seen.items():
            left = 1
            for axis, size in enumerate(tensor.shape):
                left *= size - keep[name].get(axis, 0)
            total += tensor.numel() - left
        return total

    def weights(self, model: nn.Module, role: str) -> dict[str, Tensor]:
        """Name -> float32 matrix of every maker ("out", [U, n, fan-in]) or reader ("in", [U, n, fan-out])."""
        chosen = self.makers if role == "out" else self.readers
        found = {}
        for member in chosen:
            tensor = tensor_of(model, member.name).detach().movedim(member.axis, 0).flatten(1)
            found[member.name] = tensor[member.index_Un].float()
        return found

    def views(self, model: nn.Module) -> dict[str, tuple[WeightView, Tensor]]:
        """Name of each reader's weight -> its view and the columns of w_OI that belong to each unit, [U, m].

        The statistics of these views' inputs (`input_sqnorm`, `hessian`, …) at these columns are those of the units'
        activations: m = n for a linear layer, n · kernel positions for a convolution.
        """
        found = {}
        for member in self.readers:
            module = model.get_submodule(member.module)
            view = next((one for one in module_views(member.module, module) if one.name == member.name), None)
            if view is None or view.expert is not None or view.groups > 1:
                continue
            kernel = 1 if view.transposed else tensor_of(model, member.name).shape[2:].numel()
            columns = (member.index_Un[:, :, None] * kernel + torch.arange(kernel)).flatten(1)
            found[member.name] = (view, columns)
        return found


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """Parameter or buffer by its dotted name."""
    prefix, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(prefix), leaf)
