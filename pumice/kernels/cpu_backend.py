"""Backends that run the C++ kernels of `kernels/cpu/`: numbers and integers in several layouts, few rows and many.

Few rows ("decode") are bound by memory: the stored weights stream once through the registers, where they are expanded
and multiplied. Many rows ("panel") are bound by arithmetic: some output rows at a time are expanded into a buffer that
stays in cache and multiplied by PyTorch's dense product (load as sparse, compute as dense). Where whole blocks are missing
there is less arithmetic too ("blocks"): x is transposed, and stored blocks alone are multiplied, at a dense product's rate.
Integers of eight bits meet x as bytes on CPUs that multiply those: as two of them a number ("pairs"), at the rate of bf16, and
where x may be rounded to one ("bytes") at twice that; its error then is at most a part in 254 of its row's largest magnitude.
Legend: R rows of x, O outputs, I inputs.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pumice.core.dispatch import Backend, Call, Run, limits, register
from pumice.core.errors import PumiceError
from pumice.kernels.derived import derived
from pumice.kernels.planned import panel, streamed
from pumice.weights.layouts.base import Packed

try:
    from pumice import _native as _loaded  # pyright: ignore[reportAttributeAccessIssue]
except ImportError as error:
    _loaded, _why = None, str(error)
else:
    _why = None
native: Any = _loaded

CODED = ("int8", "int8-bitmask", "int8-block", "int4", "int4-bitmask")
# Layouts that run as another one, whose positions are made from theirs when a layer is bound.
RUN_AS = {"nm": "bitmask", "int8-nm": "int8-bitmask"}
# Blocks have a kernel of their own for more rows, which is faster from about here on.
DECODE_ROWS = {"dense": 4, **dict.fromkeys(("bitmask", *CODED, *RUN_AS), 16), "block": 8}
INT8 = ("int8", "int8-bitmask", "int8-nm", "int8-block")
PAIRS_FROM = 5
"""Rows from which integers of eight bits run faster as pairs of bytes of x with many rows at once."""
DECODE_GROUPS = (16, 32)
CODES = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2}
PRODUCTS = (torch.bfloat16, torch.float32)
MOST_BYTE_COLUMNS = 65536
"""Columns whose products of bytes fit a sum of 32 bits."""
STARTS = "derived_row_starts"
"""Name under which a bitmask matrix may carry its row starts, where they are known already (never stored)."""


def missing() -> str | None:
    """Why the C++ kernels are not there, or None."""
    if native is not None:
        return None
    return f"the C++ kernels were not built when Pumice was installed ({_why}); install a C++ compiler and reinstall"


def instruction_sets() -> dict[str, str | None]:
    """The sets of kernels, best first, each with the reason why this CPU cannot run it, or None."""
    if native is None:
        return {}
    has = ", ".join(native.features()) or "none of the known ones"
    lacks = {"code": "this build was compiled without it"}
    return {
        name: None if gap is None else lacks.get(gap, f"needs {gap}, this CPU has {has}")
        for name, gap in native.kernels()
    }


def force(name: str | None) -> None:
    """Run the kernels of one instruction set (`instruction_sets()` lists them) from now on; None is the best one.

    Raises:
        PumiceError: no such set, or this CPU cannot run it.
    """
    if native is None:
        raise PumiceError(f"instruction set {name!r} cannot be forced: {missing()}.")
    known = instruction_sets()
    if name is not None and known.get(name, "no such set") is not None:
        able = ", ".join(key for key, reason in known.items() if reason is None)
        raise PumiceError(
            f"instruction set {name!r} cannot run here ({known.get(name, 'unknown')}): choose one of {able}."
        )
    native.force(name)


def _torch_library() -> ctypes.CDLL | None:
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
    except OSError:
        return None


def _use_torch_threads() -> bool:
    """Let the kernels run on PyTorch's own threads, so that two pools do not fight for the cores; False if they cannot."""
    loop = getattr(_torch_library(), "torch_parallel_for", None)
    if loop is None:
        return False
    native.set_parallel_for(ctypes.cast(loop, ctypes.c_void_p).value)
    return True


torch_threads: bool = native is not None and _use_torch_threads()


def row_starts(bitmask: Tensor, width: int) -> Tensor:
    """Where each row's values begin: bitmask uint8 [O, ceil(I / 8)] to int64 [O + 1]."""
    starts = torch.zeros(bitmask.shape[0] + 1, dtype=torch.int64)
    if native is not None:
        bitmask = bitmask.contiguous()
        native.row_starts(bitmask.data_ptr(), bitmask.shape[0], width, starts.data_ptr())
        return starts
    counts = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.int64)
    starts[1:] = counts[bitmask.int()].sum(1).cumsum(0)
    return starts


def nm_bitmask(codes: Tensor, width: int, n: int, m: int) -> Tensor:
    """The positions of N:M codes as a bitmask: uint8 [O, bytes] to uint8 [O, ceil(I / 8)], kept while the codes live.

    Raises:
        ValueError: a code that stands for no choice of n from m.
    """

    def make() -> Tensor:
        out = torch.empty(codes.shape[0], -(-width // 8), dtype=torch.uint8)
        stored = codes.contiguous()
        native.nm_bitmask(stored.data_ptr(), stored.shape[0], width, n, m, out.data_ptr())
        return out

    return derived((codes,), make)


def row_sums(packed: Packed) -> Tensor:
    """The sum of each row's integers, int32 [O], of a layout of int8, kept while what it stores lives and is unchanged."""
    values, outputs = packed.tensors["values"], packed.shape[0]
    where = packed.tensors.get("row_starts", packed.tensors.get("bitmask"))

    def make() -> Tensor:
        if where is None:
            return values.view(outputs, -1).sum(1, dtype=torch.int32)
        if packed.layout == "int8-block":
            starts, of_numbers = where.long(), values.sum(-1, dtype=torch.int32)
        else:
            starts, of_numbers = row_starts(where, packed.shape[1]), values
        if starts[-1] != len(values):
            raise ValueError(f"{len(values)} values are stored for {int(starts[-1])} places")
        before = of_numbers.new_zeros(1, *of_numbers.shape[1:], dtype=torch.int64)
        return torch.cat([before, of_numbers.cumsum(0)])[starts].diff(dim=0).flatten().int()

    return derived((values,) if where is None else (values, where), make)


def _as_bitmask(packed: Packed) -> Packed:
    """An N:M matrix as the bitmask kernels take it, its numbers shared."""
    (outputs, width), n, m = packed.shape, packed.params["n"], packed.params["m"]
    kept = width // m * n
    others = {name: tensor for name, tensor in packed.tensors.items() if name != "codes"}
    if others["values"].shape != (outputs, kept):
        raise ValueError(f"{others['values'].numel()} values are stored")
    mask = nm_bitmask(packed.tensors["codes"], width, n, m)
    starts = torch.arange(outputs + 1, dtype=torch.int64) * kept
    return Packed(RUN_AS[packed.layout], packed.shape, packed.dtype, {**others, "bitmask": mask, STARTS: starts})


class Plan:
    """A stored matrix as the kernels take it: addresses checked once, and the tensors that they point into.

    `sums`: with those of the rows of integers, which products of bytes need.
    """

    def __init__(self, packed: Packed, bias: Tensor | None, sums: bool = False) -> None:
        if native is None:
            raise PumiceError(f"layout={packed.layout!r} has no C++ kernel here: {missing()}.")
        self.shape, self.dtype = packed.shape, packed.dtype
        bias_O = None if bias is None else bias.detach().to(torch.float32).contiguous()
        common = (0 if bias_O is None else bias_O.data_ptr(), *packed.shape)
        try:
            sums_O = row_sums(packed) if sums or packed.layout == "int8-block" else None
            if packed.layout in RUN_AS:
                packed = _as_bitmask(packed)
            stored = {name: tensor.detach().contiguous() for name, tensor in packed.tensors.items()}
            self.keep: list[Tensor | None] = [*stored.values(), bias_O]
            if packed.layout in CODED:
                self.handle = self._coded(packed, stored, common, sums_O)
                return
            if packed.layout == "dense":
                self.handle = native.plan_dense(stored["weight"].data_ptr(), *common, CODES[packed.dtype])
                return
            values = stored["values"]
            if packed.layout == "bitmask":
                starts = stored.get(STARTS)
                if starts is None:
                    starts = row_starts(stored["bitmask"], packed.shape[1])
                    self.keep.append(starts)
                if starts.shape != (packed.shape[0] + 1,):
                    raise ValueError(f"row_starts has {starts.numel()} entries for {packed.shape[0]} rows")
                head = (values.data_ptr(), values.numel(), stored["bitmask"].data_ptr(), starts.data_ptr())
                self.handle = native.plan_bitmask(*head, *common, CODES[packed.dtype])
            else:
                self.handle = self._blocks(packed, stored, common)
        except ValueError as error:
            raise PumiceError(f"layout={packed.layout!r} of shape {packed.shape} is damaged: {error}.") from None

    def _blocks(
        self,
        packed: Packed,
        stored: dict[str, Tensor],
        common: tuple[int, int, int],
        coded: Sequence[Tensor | None] = (None, None),
    ) -> Any:
        """The handle of blocks of numbers, or of integers with `coded`, their scales and their rows' sums."""
        values, size = stored["values"], (packed.params["r"], packed.params["c"])
        where = [0 if t is None else t.data_ptr() for t in (stored["columns"], stored["row_starts"], *coded)]
        return native.plan_block(values.data_ptr(), values.shape[0], *where, *common, *size, CODES[packed.dtype])

    def _coded(
        self, packed: Packed, stored: dict[str, Tensor], common: tuple[int, int, int], sums_O: Tensor | None
    ) -> Any:
        """The handle of integers with scales."""
        group = packed.params.get("group", 0)
        numbers = next(stored[name] for name in ("codes", "values") if name in stored)
        scales, zeros, mask = stored["scales"].to(packed.dtype), stored.get("zeros"), stored.get("bitmask")
        starts = None
        if mask is not None:
            starts = stored.get(STARTS)
            starts = row_starts(mask, packed.shape[1] // (group or 1)) if starts is None else starts
        count = numbers.shape[0] if group else numbers.numel()
        self.keep += [scales, starts, sums_O]
        if scales.numel() != (count if group else packed.shape[0]):
            raise ValueError(f"{scales.numel()} scales are stored")
        if packed.layout == "int8-block":
            return self._blocks(packed, stored, common, (scales, sums_O))
        sums = 0 if sums_O is None else sums_O.data_ptr()
        where = [0 if tensor is None else tensor.data_ptr() for tensor in (mask, starts, scales, zeros)]
        return native.plan_coded(numbers.data_ptr(), count, *where, *common, group, CODES[packed.dtype], sums)


def _refuse_decode(call: Call) -> str | None:
    instead = {"dense": "torch", "block": "blocks"}.get(call.layout, "panel")
    # Blocks of one row share nothing of x, so transposing it pays later.
    most = DECODE_ROWS[call.layout] * (2 if call.params.get("r") == 1 and call.layout == "block" else 1)
    if call.layout in INT8 and _refuse_pairs(call) is None:
        most, instead = PAIRS_FROM - 1, "pairs"
    reason = limits(call, devices=("cpu",), dtypes=PRODUCTS, max_rows=most, instead=instead)
    group = call.params.get("group", DECODE_GROUPS[0])
    if reason is None and group not in DECODE_GROUPS:
        return f"groups of {group} have no kernel for few rows (16 and 32 only)"
    return reason or missing()


def _refuse_blocks(call: Call) -> str | None:
    return limits(call, devices=("cpu",), dtypes=PRODUCTS) or missing()


def lacks_bytes(call: Call) -> str | None:
    """Why the kernels in use do not multiply the integers of this call as bytes, or None."""
    reason = missing()
    if reason is None and not native.has_bytes():
        return f"the kernels in use ({native.current()}) have no products of bytes in fours (AVX-512 VNNI)"
    if reason is None and not 0 < call.shape[1] <= MOST_BYTE_COLUMNS:
        return f"its sums have room for 1 to {MOST_BYTE_COLUMNS} columns, not {call.shape[1]}"
    return reason


def _refuse_bytes(call: Call) -> str | None:
    if call.activations != "int8":
        return "it rounds x to eight bits a row: only where that is asked for (pack(activations='int8'))"
    return limits(call, devices=("cpu",), dtypes=PRODUCTS) or lacks_bytes(call)


def _refuse_pairs(call: Call) -> str | None:
    return limits(call, devices=("cpu",), dtypes=(torch.bfloat16,)) or lacks_bytes(call)


def _refuse_panel(call: Call) -> str | None:
    dtypes = PRODUCTS if RUN_AS.get(call.layout, call.layout) in CODED else tuple(CODES)
    return limits(call, devices=("cpu",), dtypes=dtypes) or missing()


def _prepare_decode(packed: Packed, bias: Tensor | None) -> Run:
    return streamed(Plan(packed, bias), native.run)


def _prepare_blocks(packed: Packed, bias: Tensor | None) -> Run:
    return streamed(Plan(packed, bias), native.run_blocks)


def _prepare_bytes(packed: Packed, bias: Tensor | None) -> Run:
    return streamed(Plan(packed, bias, sums=True), native.run_bytes, 1)


def _prepare_pairs(packed: Packed, bias: Tensor | None) -> Run:
    return streamed(Plan(packed, bias, sums=True), native.run_bytes, 2)


def _prepare_panel(packed: Packed, bias: Tensor | None) -> Run:
    return panel(Plan(packed, None), bias, native.expand, packed.params.get("r", 1))


def _extra(packed: Packed) -> int:
    """A mask and the rows' starts, where they are made from other positions; of eight bits the rows' sums.

    One function for all backends, which share these, so that they count once; `decode` alone would need no sums.
    """
    sums = 4 if packed.layout in INT8 else 0
    made = -(-packed.shape[1] // 8) + 8 if packed.layout in RUN_AS else 0
    return packed.shape[0] * (made + sums)


FEW, MANY = "C++: weights streamed once, few rows", "C++ expands some rows, then dense product"
for _layout in DECODE_ROWS:
    register(Backend("decode", "linear", _layout, _refuse_decode, _prepare_decode, 30, FEW, _extra))
    if _layout == "dense":
        continue
    register(Backend("panel", "linear", _layout, _refuse_panel, _prepare_panel, 20, MANY, _extra))
_BLOCKS = "C++: x transposed, only stored blocks multiplied, many rows"
register(Backend("blocks", "linear", "block", _refuse_blocks, _prepare_blocks, 25, _BLOCKS))
_PAIRS = "C++: integers times x in two bytes a number, many rows"
_BYTES = "C++: integers times x rounded to eight bits a row, many rows"
for _layout in INT8:
    register(Backend("bytes", "linear", _layout, _refuse_bytes, _prepare_bytes, 28, _BYTES, _extra))
    register(Backend("pairs", "linear", _layout, _refuse_pairs, _prepare_pairs, 25, _PAIRS, _extra))
