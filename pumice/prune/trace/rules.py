"""How each ATen operator hands labels on: a rule per kind of operator, looked up by its name.

Shapes: T rows, K the contracted axis, N columns, B batch (heads included), C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pumice.prune.trace.labels import FIXED, Classes, Lab, spans


def _size(tensor: Tensor, axis: int) -> int:
    """Positions along an axis that are not one and the same memory."""
    return 1 if tensor.size(axis) > 1 and tensor.stride(axis) == 0 else tensor.size(axis)


class Rules:
    """The rules, over the labels of the tensors seen so far."""

    def __init__(self) -> None:
        self.classes = Classes()
        self.known: dict[int, tuple[Tensor, Lab]] = {}
        self.views: list[Tensor] = []
        self.heads: list[Tensor] = []

    def of(self, value: Any) -> Lab | None:
        found = self.known.get(id(value)) if isinstance(value, Tensor) else None
        return found[1] if found is not None and found[1].coords else None

    def set(self, tensor: Tensor, lab: Lab | None) -> None:
        # The tensor is held, or its id could come back as another one's.
        if lab is not None:
            self.known[id(tensor)] = (tensor, lab)

    def activation(self, value: Any, like: Tensor | None = None) -> Tensor | None:
        """The one label of a tensor; of a weight the axis that `like` varies along (else the last), the rest is pinned."""
        lab = self.of(value)
        if lab is None:
            return None
        if len(lab.coords) == 1:
            return lab.coords[0]
        wanted = self.classes.root_axes(like) if like is not None else []
        behind = [axis - (like.dim() - value.dim()) for axis in wanted] if like is not None else []
        chosen = next((c for c in lab.coords if any(a >= 0 and spans(c, a) for a in behind)), lab.coords[-1])
        for coord in lab.coords:
            if coord is not chosen:
                self.classes.pin(coord, "its weight is added or multiplied along another axis")
        return chosen

    def pointwise(self, operands: Sequence[Any], shape: torch.Size) -> Tensor | None:
        """The label of an elementwise result: what meets in one element belongs together."""
        tensors = [one for one in operands if isinstance(one, Tensor)]
        plain = [self.of(one) for one in tensors]
        like = next(
            (lab.coords[0] for lab in plain if lab is not None and len(lab.coords) == 1 and not lab.weight), None
        )
        label: Tensor | None = like.expand(shape) if like is not None else None
        for tensor, lab in zip(tensors, plain, strict=True):
            other = self.activation(tensor, label) if lab is not None else None
            if lab is None or other is None:
                continue
            if label is None:
                label = other.expand(shape)
            elif other is not like:
                label = self._meet(label, other.expand(shape), lab.weight)
        for tensor, lab in zip(tensors, plain, strict=True):
            if label is not None and lab is None and tensor.dim():
                self._meet_constant(label, tensor, shape)
        return label

    def _meet(self, label: Tensor, other: Tensor, weight: bool) -> Tensor:
        """Join two labels; a weight that several channels share stays, and its extent holds them together."""
        if not self.classes.axes(label):
            label, other = other, label
            self.classes.union(label, other)
            return label
        across = [axis for axis in self.classes.root_axes(label) if not spans(other, axis)]
        along = self.classes.axes(other)
        if weight and across and along:
            self.classes.pin(other, "several heads share it")
            self.classes.join(label, along)
            return label
        self.classes.union(label, other)
        return label

    def _meet_constant(self, label: Tensor, tensor: Tensor, shape: torch.Size) -> None:
        """A tensor without labels has as many positions afterwards as before, so what varies along them stays whole."""
        lead = len(shape) - tensor.dim()
        fixed = [axis for axis in self.classes.axes(label) if axis >= lead and _size(tensor, axis - lead) > 1]
        if fixed:
            self.classes.join(label, fixed)

    def pointwise_constant(self, coord: Tensor, constant: Tensor) -> None:
        """One axis of a weight meets a tensor of fixed extent: it stays where both have that axis."""
        axes = [axis for axis in range(coord.dim()) if spans(coord, axis)]
        lead = coord.dim() - constant.dim()
        if any(axis >= lead and _size(constant, axis - lead) > 1 for axis in axes):
            self.classes.pin(coord, "its weight is multiplied by values of fixed shape")

    def contract(self, label: Tensor | None, lab: Lab | None, shape: torch.Size) -> Tensor | None:
        """x [..., K] times a weight [K, N]: K is consumed, N is made. Returns the label of the result [..., N]."""
        classes = self.classes
        into = next((c for c in lab.coords if spans(c, 0)), None) if lab is not None else None
        outof = next((c for c in lab.coords if spans(c, 1)), None) if lab is not None else None
        made = outof.narrow(0, 0, 1).expand(shape) if outof is not None else None
        if into is not None:
            classes.used[into[:, 0]] = True
        if label is None:
            if into is not None:
                classes.pin(into, "it reads the model's inputs")
            if outof is not None:
                classes.made[outof[0]] = True
            return made
        along = label.dim() - 1 in classes.axes(label)
        outer = [axis for axis in classes.root_axes(label) if axis != label.dim() - 1]
        if outer:
            # The same weight serves every row of the outer axis: heads, or channels that stand where tokens usually do.
            for coord in (into, outof):
                if coord is not None:
                    classes.pin(coord, "several heads share it")
            if along:
                classes.join(label, [label.dim() - 1])
            return label.narrow(-1, 0, 1).expand(shape)
        vector = label.reshape(-1, label.size(-1))[0]
        if into is not None:
            classes.union(vector, into[:, 0])
        else:
            classes.pin(vector, "what reads it is no weight")
        if outof is not None:
            classes.made[outof[0]] = True
        return made

    def batched(self, a: Tensor | None, b: Tensor | None, shape: torch.Size) -> Tensor | None:
        """a [B, M, K] times b [B, K, N], both activations: what is contracted is one unit per batch position."""
        classes = self.classes
        along = []
        for label, axis in ((a, 2), (b, 1)):
            if label is not None and axis in classes.axes(label):
                classes.join(label, [axis])
                along.append(label)
        first = None if a is None else a[:, :1, :1]
        second = None if b is None else b[:, :1, :1]
        across = a is not None and 1 in classes.axes(a)
        down = b is not None and 2 in classes.axes(b)
        if a is not None and b is not None:
            if along:
                classes.union(first, second)  # type: ignore[arg-type]
                self.heads.append(first.flatten())  # type: ignore[union-attr]
            if across:
                classes.union(a[:, :, :1], second)  # type: ignore[arg-type]
            if down:
                classes.union(b[:, :1, :], first)  # type: ignore[arg-type]
            if not along and not across and not down:
                classes.union(first, second)  # type: ignore[arg-type]
        if down and b is not None:
            return b[:, :1, :].expand(shape)
        if across and a is not None:
            return a[:, :, :1].expand(shape)
        found = first if first is not None else second
        return None if found is None else found.expand(shape)

    def attention(self, q: Tensor | None, k: Tensor | None, v: Tensor | None, shape: torch.Size) -> Tensor | None:
        """Scaled dot product attention over [B, heads, T, d]: everything of a head is one unit."""
        heads = shape[1]
        found = []
        for label in (q, k, v):
            if label is None:
                found.append(None)
                continue
            self.classes.join(label, [3])
            found.append(label.repeat_interleave(heads // label.size(1), 1) if label.size(1) != heads else label)
        present = [label[:1, :, :1, :1] for label in found if label is not None]
        for label in present[1:]:
            self.classes.union(present[0], label)
        if present:
            self.heads.append((present[0] if found[0] is None else found[0][:1, :, :1, :1]).flatten())
        return None if found[2] is None else found[2][:, :, :1, :].expand(shape)

    def convolution(
        self, label: Tensor | None, lab: Lab | None, transposed: bool, groups: int, shape: torch.Size
    ) -> Tensor | None:
        """x [B, C, ...] with a kernel [O, C/groups, ...] (transposed: [C, O/groups, ...])."""
        classes = self.classes
        if lab is None:
            if label is not None:
                classes.pin(label, "what reads it is no weight")
            return None
        for coord in lab.coords:
            if any(spans(coord, axis) for axis in range(2, coord.dim())):
                classes.pin(coord, "positions of a kernel")
        rows = next((c for c in lab.coords if spans(c, 0)), None)
        columns = next((c for c in lab.coords if spans(c, 1)), None)
        rows = None if rows is None else rows.flatten(1)[:, 0]
        columns = None if columns is None else columns.transpose(0, 1).flatten(1)[:, 0]
        into, outof = (rows, columns) if transposed else (columns, rows)
        channels = None if label is None else label.transpose(0, 1).flatten(1)[:, 0]
        if label is not None and set(classes.root_axes(label)) - {1}:
            classes.pin(label, "a convolution reads its channels along another axis")
        if groups > 1:
            return self._grouped(channels, into, outof, groups, shape)
        if into is not None:
            classes.used[into] = True
            if channels is None:
                classes.pin(into, "it reads the model's inputs")
            else:
                classes.union(channels, into)
        elif channels is not None:
            classes.pin(channels, "its only reader has one input")
        if outof is None:
            return None
        classes.made[outof] = True
        return outof.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)

    def _grouped(
        self, channels: Tensor | None, into: Tensor | None, outof: Tensor | None, groups: int, shape: torch.Size
    ) -> Tensor | None:
        """A group is one unit: its inputs and its outputs; depthwise, a channel."""
        classes = self.classes
        if outof is None or channels is None:
            for label in (channels, outof, into):
                if label is not None:
                    classes.pin(label, "a grouped convolution reads the model's inputs")
        if into is not None:
            classes.pin(into, "inputs inside a group of a convolution")
        if outof is None:
            return None
        if len(outof) % groups == 0 and len(outof) != shape[1]:
            outof = outof.repeat(groups)
        by_group = outof.view(groups, -1)
        classes.union(by_group, by_group[:, :1])
        if channels is not None:
            classes.union(channels.view(groups, -1), by_group[:, :1])
        return outof.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)

    def normalised(self, x: Any, width: int) -> None:
        """A norm over the last `width` axes; inside a head it keeps the head whole."""
        label = self.activation(x)
        if label is not None:
            inside = list(range(label.dim() - width, label.dim()))
            if set(self.classes.axes(label)) - set(inside) and set(self.classes.axes(label)) & set(inside):
                self.classes.join(label, inside)

    def reduced(self, label: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor | None:
        """A reduction: gone with the channels it runs over, unless other axes still tell units apart."""
        inside = [axis % label.dim() for axis in axes] or list(range(label.dim()))
        found = self.classes.axes(label)
        if set(found) & set(inside):
            if not set(found) - set(inside):
                return None
            self.classes.join(label, inside)
        for axis in inside:
            label = label.narrow(axis, 0, 1)
        return label if keepdim else label.squeeze(inside) if inside else label

    def joined(self, tensors: Sequence[Tensor], axis: int) -> Tensor | None:
        """A concatenation."""
        like = next((self.of(one) for one in tensors if self.of(one) is not None), None)
        if like is None:
            return None
        axis %= tensors[0].dim()
        first = next((lab.coords[0] for one in tensors if (lab := self.of(one)) and len(lab.coords) == 1), None)
        labels = [self.activation(one, first) for one in tensors]
        present = [label for label in labels if label is not None]
        if not any(axis in self.classes.axes(label) for label in present):
            # Tokens or pixels were joined: their channels are the same ones.
            # (Single channels that vary along nothing may be joined channels as well, and are only lined up.)
            first = present[0].narrow(axis, 0, 1)
            if len(present) == len(labels) and any(map(self.classes.axes, present)):
                for label in present[1:]:
                    self.classes.union(first, label.narrow(axis, 0, 1))
                size = sum(tensor.size(axis) for tensor in tensors)
                return first.expand([size if one == axis else -1 for one in range(first.dim())])
        filled = []
        for tensor, label in zip(tensors, labels, strict=True):
            if label is None:
                for other in present:
                    if any(one != axis and _size(tensor, one) > 1 for one in self.classes.axes(other)):
                        self.classes.pin(other, "it stands beside values that no weight made")
                label = torch.full((1,) * tensor.dim(), FIXED).expand(tensor.shape)
            filled.append(label)
        return torch.cat(filled, axis)
