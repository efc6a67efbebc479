"""From an operation to the code that runs it: backends register here, and each that will not run says why.

Kernels register themselves; this module imports `pumice.kernels` by name only, when somebody first asks.
Legend: R rows of x, O outputs, I inputs.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pumice.core.errors import PumiceError

KERNELS = "pumice.kernels"


class Stored(Protocol):
    """What a kernel may know of a stored matrix (`Packed` of the layouts is one)."""

    layout: str
    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: dict[str, Tensor]
    params: dict[str, int]


@dataclass(frozen=True)
class Call:
    """One use of an operation: everything that decides which backends can run it."""

    op: str
    layout: str
    dtype: torch.dtype
    device: str
    rows: int
    shape: tuple[int, int]
    params: Mapping[str, int] = field(default_factory=dict)
    activations: str | None = None
    """What x may be rounded to: "int8" where the caller allows it, None where it may not be rounded."""


Run = Callable[..., Tensor]


def _nothing(packed: Any) -> int:
    return 0


@dataclass(frozen=True)
class Backend:
    """One way to run `op` on a matrix stored in `layout`.

    `refuse(call)` is None or the reason why not, for a human. `prepare(packed, bias)` binds the state of one layer
    and returns `run(x_RI) -> y_RO`, which is the hot path: for inference only, it keeps no gradients. Among those
    that do not refuse, the highest `priority` is taken where nobody has measured. `extra(packed)` is what a bound layer
    keeps in memory beside the stored tensors, in bytes: a copy in another order, positions in another form.
    """

    name: str
    op: str
    layout: str
    refuse: Callable[[Call], str | None]
    prepare: Callable[[Any, Tensor | None], Run]
    priority: int = 0
    summary: str = ""
    extra: Callable[[Any], int] = _nothing


_backends: dict[tuple[str, str, str], Backend] = {}
_traced: dict[str, Run] = {}
_discovered = False


def register(backend: Backend) -> Backend:
    """Add a backend; a second one of the same op, layout and name is an error unless it is the same module reloaded."""
    key = (backend.op, backend.layout, backend.name)
    old = _backends.get(key)
    if old is not None and old.prepare.__module__ != backend.prepare.__module__:
        raise PumiceError(f"backend {backend.name!r} of {backend.op}/{backend.layout} is registered twice: rename one.")
    _backends[key] = backend
    return backend


def register_traced(op: str, function: Run) -> None:
    """Set the function `(packed, bias, x_RI, *more) -> y_RO` that runs `op` as graph operators with gradients."""
    _traced[op] = function


def discover() -> None:
    """Import every module of `pumice.kernels` once.

    Raises:
        PumiceError: one does not import; the message names its file.
    """
    global _discovered
    if _discovered:
        return
    package = importlib.import_module(KERNELS)
    for module in pkgutil.iter_modules(package.__path__, prefix=f"{KERNELS}."):
        try:
            importlib.import_module(module.name)
        except Exception as error:
            path = "/".join(module.name.split(".")) + ".py"
            raise PumiceError(f"kernel file {path} does not import: {type(error).__name__}: {error}.") from error
    _discovered = True


def backends(op: str | None = None, layout: str | None = None) -> list[Backend]:
    """The registered backends, best priority first."""
    discover()
    found = [b for b in _backends.values() if op in (None, b.op) and layout in (None, b.layout)]
    return sorted(found, key=lambda b: (-b.priority, b.name))


def candidates(call: Call) -> list[tuple[Backend, str | None]]:
    """Every backend of the call's op and layout, best first, with the reason why it will not run or None."""
    return [(backend, backend.refuse(call)) for backend in backends(call.op, call.layout)]


def choose(call: Call) -> Backend:
    """The best backend that does not refuse.

    Raises:
        PumiceError: all of them refuse; the message gives each reason.
    """
    found = candidates(call)
    for backend, reason in found:
        if reason is None:
            return backend
    reasons = "; ".join(f"{backend.name}: {reason}" for backend, reason in found) or "none is registered"
    raise PumiceError(
        f"no backend runs {call.op} on layout={call.layout!r}, {call.dtype}, {call.device}, {call.rows} rows "
        f"({reasons}): unpack the layer to dense."
    )


def get(op: str, layout: str, name: str) -> Backend:
    """The backend of that name, whether or not it refuses.

    Raises:
        PumiceError: there is none; the message lists those that exist.
    """
    found = {backend.name: backend for backend in backends(op, layout)}
    if name not in found:
        raise PumiceError(f"unknown backend {name!r} of {op}/{layout}: known are {', '.join(found) or 'none'}.")
    return found[name]


def traced(op: str, packed: Any, bias: Tensor | None, x: Tensor, *more: Any) -> Tensor:
    """`op` by operators that torch.compile, torch.export and autograd see; slower to call than a prepared backend."""
    if op not in _traced:
        discover()
    if op not in _traced:
        raise PumiceError(f"op={op!r} has no traced form: known are {', '.join(_traced) or 'none'}.")
    return _traced[op](packed, bias, x, *more)


def limits(
    call: Call,
    *,
    dtypes: tuple[torch.dtype, ...] | None = None,
    devices: tuple[str, ...] | None = None,
    max_rows: int | None = None,
    instead: str = "another backend",
) -> str | None:
    """Reason why a call is outside a backend's plain limits, or None: the common part of `refuse`."""
    if devices is not None and torch.device(call.device).type not in devices:
        return f"device {call.device} not supported by this kernel ({', '.join(devices)} only)"
    if dtypes is not None and call.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"dtype {str(call.dtype).removeprefix('torch.')} not supported by this kernel ({names} only)"
    if max_rows is not None and call.rows > max_rows:
        return f"rows {call.rows} > {max_rows}: use {instead}"
    return None
