"""How a 2-D convolution is done, apart from its weight: what the op `conv2d` takes beside a stored matrix.

Legend: N images, C channels, H rows, W columns, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

Pair = tuple[int, int]
BUNDLE = 8
"""Outputs that a kernel may take together, so that they share the columns that any of them has."""


def bundles(w_OI: Tensor) -> Tensor:
    """A weight in whole bundles, filled up with rows of zeros: [bundles, BUNDLE, I]."""
    return pad(w_OI, (0, 0, 0, -len(w_OI) % BUNDLE)).unflatten(0, (-1, BUNDLE))


def bundled_share(w_OI: Tensor) -> float:
    """The share of all columns that a bundle has: all zeros of groups of outputs can be left out, few of those at random."""
    return float((bundles(w_OI) != 0).any(1).float().mean())


@dataclass(frozen=True)
class Convolution:
    """Kernel, stride, zeros added before and after, dilation (rows first, then columns), and the range of the result.

    `clamp` is (-inf, inf) for a plain convolution, (0, inf) with a ReLU behind it, (0, 6) with a ReLU6.
    """

    kernel_size: Pair
    stride: Pair = (1, 1)
    before: Pair = (0, 0)
    after: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    clamp: tuple[float, float] = (-math.inf, math.inf)

    @classmethod
    def of(
        cls,
        kernel_size: Pair,
        stride: Pair,
        padding: Sequence[int] | str,
        dilation: Pair,
        groups: int = 1,
        clamp: tuple[float, float] = (-math.inf, math.inf),
    ) -> Convolution:
        """From what `nn.Conv2d` holds: `padding` is two numbers, "valid" or "same"."""
        if padding == "same":
            whole = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
            before, after = (whole[0] // 2, whole[1] // 2), (whole[0] - whole[0] // 2, whole[1] - whole[1] // 2)
            return cls(kernel_size, stride, before, after, dilation, groups, clamp)
        both = (0, 0) if isinstance(padding, str) else (padding[0], padding[1])
        return cls(kernel_size, stride, both, both, dilation, groups, clamp)

    @property
    def params(self) -> dict[str, int]:
        """What decides which backends can run it, as a `Call` takes it."""
        return {"groups": self.groups, "kernel_h": self.kernel_size[0], "kernel_w": self.kernel_size[1]}

    def output(self, height: int, width: int) -> Pair:
        """Rows and columns of the result; none where the kernel does not fit."""
        found = []
        for axis, size in enumerate((height, width)):
            room = size + self.before[axis] + self.after[axis] - self.dilation[axis] * (self.kernel_size[axis] - 1) - 1
            found.append(room // self.stride[axis] + 1 if room >= 0 else 0)
        return found[0], found[1]
