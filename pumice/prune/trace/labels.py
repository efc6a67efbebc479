"""Which elements of tensors belong to one channel: labels that are joined while a model runs.

Every axis of every weight gives each of its positions an id. An id says: "this element of an activation exists because
of that row of that weight". What must be removed together ends up in one class of a union-find structure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FIXED = 0
"""The id of elements that no weight made and that therefore cannot go."""


@dataclass
class Lab:
    """Labels of one tensor: id tensors of its shape, one for an activation, one per axis for a weight.

    They are expanded where they do not vary, so that those of a large weight take no memory. `weight` is true for
    weights and views of them.
    """

    coords: list[Tensor]
    weight: bool = False


def spans(label: Tensor, axis: int) -> bool:
    """Whether a label has memory along an axis, which for the labels of a weight says that it is that axis' own."""
    return label.size(axis) > 1 and label.stride(axis) != 0


def varies(label: Tensor, axis: int) -> bool:
    """Whether the ids differ along an axis."""
    return spans(label, axis) and bool((label != label.narrow(axis, 0, 1)).any())


def squash(*labels: Tensor) -> list[Tensor]:
    """Labels of one shape, with the axes cut to one position along which none of them varies."""
    for axis in range(labels[0].dim()):
        if labels[0].size(axis) > 1 and all(label.stride(axis) == 0 for label in labels):
            labels = tuple(label.narrow(axis, 0, 1) for label in labels)
    return list(labels)


class Classes:
    """Union-find over ids, on whole tensors at once; classes can be pinned with a reason."""

    def __init__(self) -> None:
        self.parent = torch.zeros(1, dtype=torch.long)
        self.reasons: list[tuple[Tensor, str]] = []
        self.made = torch.zeros(1, dtype=torch.bool)
        self.used = torch.zeros(1, dtype=torch.bool)

    def new(self, count: int) -> Tensor:
        """`count` fresh ids."""
        start = len(self.parent)
        ids = torch.arange(start, start + count)
        self.parent = torch.cat([self.parent, ids])
        more = torch.zeros(count, dtype=torch.bool)
        self.made, self.used = torch.cat([self.made, more]), torch.cat([self.used, more])
        return ids

    def find(self, ids: Tensor) -> Tensor:
        """The root of every id."""
        small = squash(ids)[0]
        root = self.parent[small]
        while True:
            above = self.parent[root]
            if torch.equal(above, root):
                break
            root = above
        self.parent[small] = root
        return root.expand(ids.shape)

    def union(self, a: Tensor, b: Tensor) -> None:
        """Join a[...] with b[...] (broadcast); what meets the fixed id is pinned."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = (one.flatten() for one in squash(a.expand(shape), b.expand(shape)))
        fixed = (a == FIXED) | (b == FIXED)
        if bool(fixed.any()):
            self.pin(torch.maximum(a, b)[fixed], "it meets values that no weight made")
            a, b = a[~fixed], b[~fixed]
        while True:
            root_a, root_b = self.find(a), self.find(b)
            differ = root_a != root_b
            if not bool(differ.any()):
                return
            a, b = a[differ], b[differ]
            high, low = torch.maximum(root_a, root_b)[differ], torch.minimum(root_a, root_b)[differ]
            self.parent.scatter_reduce_(0, high, low, "amin")

    def join(self, label: Tensor, axes: list[int]) -> None:
        """Join everything along some axes."""
        first = label
        for axis in axes:
            first = first.narrow(axis, 0, 1)
        self.union(label, first)

    def pin(self, label: Tensor, reason: str) -> None:
        """Nothing of these classes may be removed."""
        ids = squash(label)[0].flatten().unique()
        self.reasons.append((ids[ids != FIXED], reason))

    def pinned(self) -> dict[int, str]:
        """Root -> why it stays."""
        found: dict[int, str] = {}
        for ids, reason in self.reasons:
            for root in self.find(ids).unique().tolist():
                found.setdefault(root, reason)
        return found

    def axes(self, label: Tensor) -> list[int]:
        """Axes along which the ids differ."""
        return [axis for axis in range(label.dim()) if varies(label, axis)]

    def root_axes(self, label: Tensor) -> list[int]:
        """Axes along which the classes differ."""
        return self.axes(self.find(label))
