"""Checkpoints written shard by shard beside their place and moved there in one step.

Shapes: O outputs, I inputs, E experts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.view import module_views
from pumice.engine.files import check_file, check_free, fact_of, move_into_place, sync, sync_folder, write_safetensors
from pumice.weights.grid import Grid, kept
from pumice.weights.layouts.base import Packed, StorageHint, grid_of, pack_smallest, shape_of, shape_text, unpack
from pumice.weights.modules import SparseConv2d, SparseModule, sparse_twin
from pumice.weights.wrapped import Substitute

FORMAT_VERSION = 1
INDEX = "model.safetensors.index.json"
JOURNAL = "journal.json"
SHARD_BYTES = 2 << 30
_JOURNALED = ("layers", "files", "where", "done", "progress", "tied", "wrapped")
_PACKABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Weight:
    """A weight as it is stored: a matrix and how the parameter looks that it came from."""

    key: str
    """Module name where a sparse module can take the module's place, else the parameter's name."""
    kind: str
    """linear, conv2d, or tensor (expanded when loaded)."""
    parameter: str
    w_OI: Tensor
    shape: tuple[int, ...]
    transposed: bool
    grid: Grid | None = None
    """What its values are multiples of, where it was quantised."""

    def describe(self, packed: Packed) -> dict[str, Any]:
        """Its entry under `layers` in config.json."""
        shape = shape_text(self.shape)
        return {**packed.describe(), "kind": self.kind, "weight": shape, "transposed": self.transposed}


def join(prefix: str, name: str) -> str:
    """`prefix.name`, without the dot when one is empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def weights_of(name: str, module: nn.Module) -> Iterator[Weight]:
    """The weights of one module (not of its children) that may be stored sparse."""
    if isinstance(module, SparseModule):
        kind = "conv2d" if isinstance(module, SparseConv2d) else "linear"
        transposed = bool(getattr(module, "transposed", False))
        o, i = module.shape_OI
        shape = (i, o) if transposed else (o, i)
        if isinstance(module, SparseConv2d):
            shape = (o, i // (module.kernel_size[0] * module.kernel_size[1]), *module.kernel_size)
        packed = module.packed
        yield Weight(name, kind, join(name, "weight"), unpack(packed).detach(), shape, transposed, grid_of(packed))
        return
    twin = sparse_twin(module)
    kind = "tensor" if twin is None else twin.kind
    for parameter in dict.fromkeys(view.parameter for view in module_views(name, module)):
        views = [view for view in module_views(name, module) if view.parameter == parameter]
        view = views[0]
        tensor = view.tensor.detach()
        if tensor.dtype not in _PACKABLE:
            continue
        full = join(name, parameter)
        if view.transposed:
            w_OI = tensor.transpose(-1, -2).reshape(-1, tensor.shape[-2])
        else:
            w_OI = tensor.flatten(0, 1) if view.expert is not None else tensor.flatten(1)
        grid = kept(views)
        if grid is not None and not grid.fits(w_OI):
            warnings.warn(
                f"{full} was quantised and has changed since: it is stored without its grid, unquantised.", stacklevel=2
            )
            grid = None
        yield Weight(name if twin else full, kind, full, w_OI, tuple(tensor.shape), view.transposed, grid)


def restore(w_OI: Tensor, shape: Sequence[int], transposed: bool) -> Tensor:
    """The parameter of the given shape from its stored matrix: the inverse of `weights_of`."""
    if transposed:
        *lead, rows, columns = shape
        return w_OI.reshape(*lead, columns, rows).transpose(-1, -2).contiguous()
    return w_OI.reshape(*shape)


class Writer:
    """Writes a checkpoint to `OUT.partial`, module by module, and moves it to OUT when it is finished.

    As a context manager: leaving it without `finish` keeps `OUT.partial` if a `commit` was made (`Writer.resume`
    continues it), and removes it otherwise. OUT is not touched before `finish`.

    Args:
        path: the folder OUT.
        overwrite: replace an existing OUT, and forget an unfinished `OUT.partial`.
        dense: store every weight plainly, zeros written out.
        hint: the pattern that the weights were pruned to; the layout made for it is tried first.
        tied: alias -> name of the parameter that it shares; stored once, plainly, under the name.

    Raises:
        PumiceError: OUT exists, or an unfinished run lies in `OUT.partial`, and `overwrite` is not given.
    """

    def __init__(
        self,
        path: str | Path,
        overwrite: bool = False,
        *,
        dense: bool = False,
        hint: StorageHint | None = None,
        tied: Mapping[str, str] | None = None,
        shard_bytes: int = SHARD_BYTES,
        _resume: bool = False,
    ) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.overwrite, self.dense, self.hint, self.shard_bytes = overwrite, dense, hint, shard_bytes
        self.tied = dict(tied or {})
        self.layers: dict[str, dict[str, Any]] = {}
        self.wrapped: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self.where: dict[str, str] = {}
        self.done: list[str] = []
        self.progress: dict[str, Any] = {}
        self._pending: dict[str, Tensor] = {}
        self._finished = self._committed = False
        (self._continue if _resume else self._start)()

    def _start(self) -> None:
        if not self.overwrite:
            check_free(self.path)
            if (self.partial / JOURNAL).exists():
                raise PumiceError(
                    f"an unfinished run lies in {self.partial}: continue it with resume (--resume) or drop it with "
                    f"overwrite=True (--overwrite)."
                )
        shutil.rmtree(self.partial, ignore_errors=True)
        with self.guarded("the folder", 0):
            self.partial.mkdir(parents=True)

    @classmethod
    def resume(cls, path: str | Path, overwrite: bool = False, **options: Any) -> Writer:
        """Go on with what `OUT.partial` holds: `done` and `progress` say how far it got.

        Shards are read back and checked; what was written after the last `commit` is dropped.

        Raises:
            PumiceError: there is no unfinished run, or one of its shards is damaged.
        """
        return cls(path, overwrite, _resume=True, **options)

    def _continue(self) -> None:
        try:
            journal = json.loads((self.partial / JOURNAL).read_text())
        except (OSError, json.JSONDecodeError):
            raise PumiceError(
                f"resume: there is no unfinished run in {self.partial}; start it without resume."
            ) from None
        if not self.overwrite:
            check_free(self.path)
        for key in _JOURNALED:
            setattr(self, key, journal.get(key, getattr(self, key)))
        self._committed = True
        for file, fact in self.files.items():
            check_file(self.partial / file, fact)
        for stray in self.partial.iterdir():
            if stray.is_file() and stray.name not in {*self.files, JOURNAL}:
                stray.unlink()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace
        self._pending.clear()
        if not self._finished and not self._committed:
            shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """One plain tensor. Written at the latest on `commit`; do not change it before."""
        if name in self.where or name in self._pending:
            raise PumiceError(f"tensor {name!r} was added twice: every name is stored once.")
        self._pending[name] = tensor.detach()

    def add_module(self, name: str, module: nn.Module) -> None:
        """All parameters and persistent buffers under a module, each weight in its smallest layout.

        Tensors are written at the latest on `commit`; do not change them before.
        """
        for prefix, child in module.named_modules(prefix=name, remove_duplicate=True):
            self.add_own(prefix, child)
            if sum(t.numel() * t.element_size() for t in self._pending.values()) >= self.shard_bytes:
                self._flush()
        self.done.append(name)

    def add_own(self, name: str, module: nn.Module) -> None:
        """One module's own tensors."""
        if isinstance(module, Substitute):
            self.wrapped[name] = module.describe()
        plain: dict[str, Tensor] = dict(module.named_parameters(prefix=name, recurse=False, remove_duplicate=False))
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                plain[join(name, key)] = buffer
        kept_dense = {*self.tied, *self.tied.values()}
        for weight in weights_of(name, module):
            if isinstance(module, SparseModule):
                plain = {key: tensor for key, tensor in plain.items() if key == join(name, "bias")}
            elif weight.parameter in kept_dense:
                continue
            packed = pack_smallest(weight.w_OI, self.hint, weight.grid).narrow() if not self.dense else None
            if packed is None or packed.layout == "dense":
                plain[weight.parameter] = restore(weight.w_OI, weight.shape, weight.transposed)
                continue
            plain.pop(weight.parameter, None)
            self.layers[weight.key] = weight.describe(packed)
            for key, tensor in packed.tensors.items():
                self.add(join(weight.key, key), tensor)
        for key, tensor in plain.items():
            if key not in self.tied:
                self.add(key, tensor)

    def commit(self, **progress: Any) -> None:
        """Write what was added so far as a shard and note it, with `progress` (JSON), for a later `resume`."""
        self._flush()
        self.progress.update(progress)
        self._committed = True
        state = {key: getattr(self, key) for key in _JOURNALED}
        temporary = self.partial / f"{JOURNAL}.new"
        self._write_text(temporary, json.dumps(state))
        os.replace(temporary, self.partial / JOURNAL)
        sync_folder(self.partial)

    def _flush(self) -> None:
        """Pending tensors as shards of at most `shard_bytes` (a larger tensor has one for itself)."""
        group: dict[str, Tensor] = {}
        size = 0
        for name in list(self._pending):
            tensor = self._pending.pop(name)
            bytes_ = tensor.numel() * tensor.element_size()
            if group and size + bytes_ > self.shard_bytes:
                self._shard(group)
                group, size = {}, 0
            group[name] = tensor
            size += bytes_
        if group:
            self._shard(group)

    def _shard(self, tensors: dict[str, Tensor]) -> None:
        file = f"model-{len(self.files) + 1:05d}.safetensors"
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        with self.guarded(file, size):
            self.files[file] = write_safetensors(self.partial / file, tensors)
        self.where.update(dict.fromkeys(tensors, file))

    @contextlib.contextmanager
    def guarded(self, what: str, size: int = 0) -> Iterator[None]:
        """Whatever of `size` bytes (0: unknown) is written inside: a full disk becomes one sentence that says what is kept."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise PumiceError(
                    f"out={str(self.path)!r} cannot be written: {error.strerror} ({error.filename})."
                ) from error
            (self.partial / what).unlink(missing_ok=True)
            free = shutil.disk_usage(self.partial if self.partial.exists() else self.partial.parent).free
            then = (
                f"{self.partial} is kept: free some space and continue with resume (--resume)"
                if self._committed
                else f"{self.partial} is removed: free some space and start again"
            )
            untouched = f" {self.path} is as it was;" if self.path.exists() else ""
            needs = f"{what} needs {size:,} bytes" if size else f"{what} does not fit"
            raise PumiceError(
                f"the disk of out={str(self.path)!r} is full: {needs}, {free:,} are free;{untouched} {then}."
            ) from error

    def finish(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        metadata: Mapping[str, Any] | None = None,
        structure: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write index and config.json and move the folder to OUT; further files may lie in `partial` already.

        Args:
            config: content of config.json beside the `quantization_config` that is added here.
            metadata: anything JSON, kept under `quantization_config["metadata"]`.
            structure: how the model differs from what its config says (`core.structure`), None where it does not.
        """
        self._flush()
        total = sum(fact["bytes"] for fact in self.files.values())
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": self.where}, indent=1)
        stored = {
            "quant_method": "pumice",
            "format_version": FORMAT_VERSION,
            "layers": self.layers,
            "wrapped": self.wrapped,
            "tied": self.tied,
            "files": {**self.files, INDEX: fact_of(index.encode())},
            "metadata": dict(metadata or {}),
            **({"structure": dict(structure)} if structure is not None else {}),
        }
        with self.guarded("config.json", len(index)):
            self._write_text(self.partial / INDEX, index)
            whole = {**(config or {}), "quantization_config": stored}
            self._write_text(self.partial / "config.json", json.dumps(whole, indent=1) + "\n")
        (self.partial / JOURNAL).unlink(missing_ok=True)
        move_into_place(self.partial, self.path)
        self._finished = True
        return self.path

    def _write_text(self, path: Path, text: str) -> None:
        with self.guarded(path.name, len(text)), open(path, "w", encoding="utf-8") as file:
            file.write(text)
            sync(file)


def restore_entry(packed: Packed, entry: Mapping[str, Any]) -> Tensor:
    """The parameter that an entry under `layers` describes."""
    return restore(unpack(packed), shape_of(entry["weight"]), entry["transposed"])
