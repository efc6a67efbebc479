"""What a stored matrix is, and the choice of the layout that stores it in the fewest bytes.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pumice.core import registry
from pumice.core.errors import PumiceError

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.uint8,
        torch.uint16,
        torch.int32,
        torch.int64,
    )
}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def shape_text(shape: Iterable[int]) -> str:
    """`(4, 16, 32)` as "4x16x32": one line of JSON, where a list would take five."""
    return "x".join(str(size) for size in shape)


def shape_of(text: str) -> tuple[int, ...]:
    """Inverse of `shape_text`."""
    return tuple(int(size) for size in text.split("x"))


@dataclass(eq=False)
class Packed:
    """How one matrix [O, I] is stored: a layout's name, its tensors and its integer parameters.

    Exactly one tensor is floating point and holds the numbers ("values", or "weight" in the dense layout); the others
    say where they stand.
    """

    layout: str
    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: dict[str, Tensor]
    params: dict[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the dense matrix takes in the same dtype."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def value_name(self) -> str:
        """Name of the floating-point tensor."""
        return next(name for name, tensor in self.tensors.items() if tensor.is_floating_point())

    @property
    def density(self) -> float:
        """Share of the positions that hold a stored number (an explicit zero counts)."""
        total = self.shape[0] * self.shape[1]
        return self.tensors[self.value_name].numel() / total if total else 0.0

    @property
    def device(self) -> torch.device:
        return self.tensors[self.value_name].device

    def to(self, device: torch.device | str) -> Packed:
        """The same matrix on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return Packed(self.layout, self.shape, self.dtype, moved, dict(self.params))

    def astype(self, dtype: torch.dtype) -> Packed:
        """The same positions with their numbers cast to another floating dtype."""
        cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.tensors.items()}
        return Packed(self.layout, self.shape, dtype, cast, dict(self.params))

    def specs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor."""
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def describe(self) -> dict[str, Any]:
        """Everything but the numbers, ready for JSON; `Packed.empty` turns it back."""
        return {
            "layout": self.layout,
            "shape": shape_text(self.shape),
            "dtype": dtype_name(self.dtype),
            "params": dict(self.params),
            "tensors": {
                name: f"{dtype_name(dtype)} {shape_text(shape)}" for name, (shape, dtype) in self.specs().items()
            },
        }

    @classmethod
    def empty(cls, description: Mapping[str, Any], device: torch.device | str = "meta") -> Packed:
        """A `Packed` of the described layout with uninitialised tensors."""
        try:
            tensors = {}
            for name, text in description["tensors"].items():
                dtype, shape = text.split(" ")
                tensors[name] = torch.empty(shape_of(shape), dtype=DTYPES[dtype], device=device)
            o, i = shape_of(description["shape"])
            params = {key: int(value) for key, value in description["params"].items()}
            return cls(str(description["layout"]), (o, i), DTYPES[description["dtype"]], tensors, params)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise PumiceError(
                f"layer description {dict(description)!r} is not a stored matrix ({error!r}): the config.json is damaged."
            ) from None


class StorageHint(Protocol):
    """What `pack_smallest` wants to know of a pattern: the layout made for it."""

    def storage(self, o: int, i: int) -> tuple[str, dict[str, int]] | None: ...


class Layout:
    """Base of all layouts: a namespace of static methods, registered with `@layout(name)`, never instantiated.

    Zero means `== 0`, so that negative zero is a zero and NaN is not; a sparse layout gives positive zeros back.
    """

    examples: ClassVar[tuple[dict[str, int], ...]] = ({},)
    """Parameters that the conformance suite runs over."""

    @staticmethod
    def refuse(w_OI: Tensor, **params: int) -> str | None:
        """Why this matrix cannot be stored with these parameters, or None."""
        raise NotImplementedError

    @staticmethod
    def candidates(w_OI: Tensor) -> list[dict[str, int]]:
        """Parameters worth trying on a matrix of which nothing is known."""
        return [{}]

    @staticmethod
    def stored_bytes(w_OI: Tensor, **params: int) -> int:
        """`pack(w_OI).nbytes` without packing; only asked where `refuse` does not."""
        raise NotImplementedError

    @staticmethod
    def pack(w_OI: Tensor, **params: int) -> Packed:
        """The matrix in this layout."""
        raise NotImplementedError

    @staticmethod
    def unpack(packed: Packed) -> Tensor:
        """w_OI as it was, same dtype, new memory or shared."""
        raise NotImplementedError

    @staticmethod
    def fault(packed: Packed) -> str | None:
        """What is inconsistent in a `Packed` that came from outside, or None: kernels trust positions blindly."""
        raise NotImplementedError


def layout_named(name: str) -> type[Layout]:
    """The layout class called `name`; PumiceError with the known ones."""
    return registry.layout.get(name).obj


def pack(w_OI: Tensor, layout: str, **params: int) -> Packed:
    """A matrix in the named layout.

    Raises:
        PumiceError: not a floating-point matrix, an unknown layout, or the layout refuses (its reason is given).
    """
    if w_OI.dim() != 2 or not w_OI.is_floating_point():
        raise PumiceError(
            f"w_OI of shape {tuple(w_OI.shape)} and dtype {dtype_name(w_OI.dtype)} cannot be stored: give a "
            f"floating-point matrix [O, I]."
        )
    cls = layout_named(layout)
    w_OI = w_OI.detach()
    reason = cls.refuse(w_OI, **params)
    if reason is not None:
        raise PumiceError(f"layout={layout!r} cannot store this {w_OI.shape[0]} x {w_OI.shape[1]} matrix: {reason}.")
    return cls.pack(w_OI, **params)


def unpack(packed: Packed) -> Tensor:
    """w_OI of a stored matrix, exactly."""
    return layout_named(packed.layout).unpack(packed)


def validate(packed: Packed, name: str = "matrix") -> None:
    """PumiceError if the tensors of `packed` contradict each other or its shape."""
    fault = layout_named(packed.layout).fault(packed)
    if fault is not None:
        raise PumiceError(f"{name} stored as {packed.layout} is damaged: {fault}; save or download it again.")


def pack_smallest(w_OI: Tensor, hint: StorageHint | None = None) -> Packed:
    """The matrix in whichever storable layout takes the fewest bytes, dense on a tie.

    Every layout says which parameters it would try; `hint` (a pattern) adds the ones made for it. What is chosen
    depends on the matrix alone, never on the machine.
    """
    _, name, params = smallest(w_OI, hint)
    return pack(w_OI, name, **params)


def smallest(w_OI: Tensor, hint: StorageHint | None = None) -> tuple[int, str, dict[str, int]]:
    """Bytes, layout and parameters that `pack_smallest` would choose, without packing."""
    w_OI = w_OI.detach()
    wanted = hint.storage(w_OI.shape[0], w_OI.shape[1]) if hint is not None else None
    best: tuple[int, str, dict[str, int]] = (w_OI.numel() * w_OI.element_size(), "dense", {})
    for info in registry.layout.members():
        if not info.extras["storable"]:
            continue
        tried = [wanted[1]] if wanted is not None and wanted[0] == info.name else []
        for params in tried + info.obj.candidates(w_OI):
            if info.obj.refuse(w_OI, **params) is None:
                size = info.obj.stored_bytes(w_OI, **params)
                if size < best[0]:
                    best = (size, info.name, params)
    return best


def pack_bits(bits: Tensor) -> Tensor:
    """bool [..., n] as uint8 [..., ceil(n / 8)]: bit b of byte j is element 8j + b, padding bits are zero."""
    n = bits.shape[-1]
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -n % 8)).unflatten(-1, (math.ceil(n / 8), 8))
    packed = padded[..., 0].clone()
    for bit in range(1, 8):
        packed |= padded[..., bit] << bit
    return packed


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The first `n` bits of each row of bytes as bool [..., n]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :n].bool()


def shape_fault(
    packed: Packed, expected: Mapping[str, tuple[tuple[int | None, ...], tuple[torch.dtype, ...]]]
) -> str | None:
    """First tensor that is missing, or not of its expected shape (None = any length) and dtype."""
    for name, (shape, dtypes) in expected.items():
        tensor = packed.tensors.get(name)
        if tensor is None:
            return f"tensor {name!r} is missing"
        fits = len(shape) == tensor.dim() and all(w is None or w == g for w, g in zip(shape, tensor.shape, strict=True))
        if not fits or tensor.dtype not in dtypes:
            return f"{name!r} is {dtype_name(tensor.dtype)} {list(tensor.shape)}, not {dtype_name(dtypes[0])} {list(shape)}"
    extra = set(packed.tensors) - set(expected)
    return f"unknown tensor {min(extra)!r}" if extra else None
