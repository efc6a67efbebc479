"""What a stored matrix is, and the choice of the layout that stores it in the fewest bytes.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from pumice.core import registry
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.weights.grid import Grid

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.uint8,
        torch.int8,
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

    Exactly one tensor is floating point: the numbers ("values", or "weight" in the dense layout), or the "scales" of
    integers; the others say where the numbers stand, or are the integers. `dtype` is that of the matrix; scales may be
    stored in sixteen bits beside a float32 matrix.
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
        return self.numbers.numel() / total if total else 0.0

    @property
    def nonzero_share(self) -> float:
        """Share of the positions whose number is not zero."""
        return int(torch.count_nonzero(self.numbers)) / max(1, self.shape[0] * self.shape[1])

    @property
    def numbers(self) -> Tensor:
        """What is stored for each position that has a number: floating point, or integers still without their scale."""
        return layout_named(self.layout).numbers(self)

    @property
    def bits(self) -> float:
        """Stored bits per weight of the matrix, everything counted."""
        total = self.shape[0] * self.shape[1]
        return 8 * self.nbytes / total if total else 0.0

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

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors from a file in place of the empty ones; a reader that cast the numbers changes the dtype."""
        described = self.tensors[self.value_name].dtype
        self.tensors = {name: tensors[name] for name in self.tensors}
        if self.tensors[self.value_name].dtype != described:
            self.dtype = self.tensors[self.value_name].dtype

    def narrow(self) -> Packed:
        """The same matrix with the scales of its integers in sixteen bits, where that loses nothing."""
        if not layout_named(self.layout).coded:
            return self
        scales = self.tensors["scales"]
        short = scales.to(torch.bfloat16)
        if scales.dtype in (torch.float16, torch.bfloat16) or not torch.equal(short.to(scales.dtype), scales):
            return self
        return Packed(self.layout, self.shape, self.dtype, {**self.tensors, "scales": short}, dict(self.params))

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
    coded: ClassVar[bool] = False
    """Whether it stores integers: then `refuse`, `candidates`, `stored_bytes` and `pack` also take their `grid`."""
    zero_points: ClassVar[bool] = True
    """Of a coded layout: whether it takes grids with zero points."""

    @staticmethod
    def numbers(packed: Packed) -> Tensor:
        """The stored numbers (of a coded layout: the integers), whatever their shape."""
        return packed.tensors[packed.value_name]

    @staticmethod
    def grid(packed: Packed) -> Grid | None:
        """The grid of the stored integers; None where numbers are stored as they are."""
        return None

    @classmethod
    def for_files(cls, packed: Packed) -> Packed:
        """The matrix as files hold it: as it is, or of a layout for memory the one that it stands for."""
        return packed

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


class LayoutRefused(PumiceError):
    """A layout cannot store this matrix: its zeros, its size or its numbers do not fit."""


def pack(w_OI: Tensor, layout: str, *, grid: Grid | None = None, **params: int) -> Packed:
    """A matrix in the named layout; layouts of integers need the grid that the matrix lies on.

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
    given: dict[str, Any] = _given(cls, grid, params)
    reason = cls.refuse(w_OI, **given)
    if reason is not None:
        raise LayoutRefused(f"layout={layout!r} cannot store this {w_OI.shape[0]} x {w_OI.shape[1]} matrix: {reason}.")
    return cls.pack(w_OI, **given)


def _given(cls: type[Layout], grid: Grid | None, params: Mapping[str, int]) -> dict[str, Any]:
    return {**params, "grid": grid} if cls.coded else dict(params)


def possible(w_OI: Tensor, grid: Grid | None = None, *, memory: bool = False) -> list[tuple[str, dict[str, int], int]]:
    """Every layout that takes the matrix, with parameters worth trying and its bytes, dense among them.

    With `memory` those too that are never written to files.
    """
    found = []
    for info in registry.layout.members():
        if not (memory or info.extras["storable"]) or (info.obj.coded and grid is None):
            continue
        for params in info.obj.candidates(w_OI, **_given(info.obj, grid, {})):
            given = _given(info.obj, grid, params)
            if info.obj.refuse(w_OI, **given) is None:
                found.append((info.name, params, info.obj.stored_bytes(w_OI, **given)))
    return found


def repack(packed: Packed, layout: str, **params: int) -> Packed:
    """A stored matrix in another layout, its grid carried along; from integers to integers nothing is rounded."""
    if (packed.layout, packed.params) == (layout, params):
        return packed
    return pack(unpack(packed), layout, grid=grid_of(packed), **params)


def grid_of(packed: Packed) -> Grid | None:
    """The grid of a stored matrix, or None where its numbers are stored as they are."""
    return layout_named(packed.layout).grid(packed)


def unpack(packed: Packed) -> Tensor:
    """w_OI of a stored matrix, exactly."""
    return layout_named(packed.layout).unpack(packed)


def validate(packed: Packed, name: str = "matrix") -> None:
    """PumiceError if the tensors of `packed` contradict each other or its shape."""
    fault = layout_named(packed.layout).fault(packed)
    if fault is not None:
        raise PumiceError(f"{name} stored as {packed.layout} is damaged: {fault}; save or download it again.")


def pack_smallest(w_OI: Tensor, hint: StorageHint | None = None, grid: Grid | None = None) -> Packed:
    """The matrix in whichever storable layout takes the fewest bytes, dense on a tie.

    Every layout says which parameters it would try; `hint` (a pattern) adds the ones made for it, `grid` the layouts of
    integers. What is chosen depends on the matrix and its grid alone, never on the machine.
    """
    _, name, params = smallest(w_OI, hint, grid)
    return pack(w_OI.detach(), name, grid=grid, **params)


def smallest(
    w_OI: Tensor, hint: StorageHint | None = None, grid: Grid | None = None
) -> tuple[int, str, dict[str, int]]:
    """Bytes, layout and parameters that `pack_smallest` would choose, without packing."""
    w_OI = w_OI.detach()
    found = possible(w_OI, grid)
    wanted = hint.storage(w_OI.shape[0], w_OI.shape[1]) if hint is not None else None
    if wanted is not None:
        cls = layout_named(wanted[0])
        if cls.refuse(w_OI, **wanted[1]) is None:
            found.insert(0, (*wanted, cls.stored_bytes(w_OI, **wanted[1])))
            coded = f"int8-{wanted[0]}"
            if grid is not None and coded in {info.name for info in registry.layout.members()}:
                given: dict[str, Any] = {**wanted[1], "grid": grid}
                if layout_named(coded).refuse(w_OI, **given) is None:
                    found.insert(0, (coded, wanted[1], layout_named(coded).stored_bytes(w_OI, **given)))
    dense = ("dense", {}, w_OI.numel() * w_OI.element_size())
    name, params, size = min([dense, *found], key=lambda one: one[2])
    return size, name, params


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
