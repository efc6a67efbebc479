"""What sparse modules share: tensors of any layout, and the hot path through the backend that dispatch gives.

Shapes: B batch, R rows of x, O outputs, I inputs (kernel positions included).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core import dispatch, registry
from pumice.core.errors import PumiceError
from pumice.weights.layouts import base
from pumice.weights.layouts.base import Packed

# Row counts remembered per layer; a server sees thousands of prompt lengths, not millions.
MAX_REMEMBERED = 4096


class _Bound:
    """What the hot path needs of one layer, gathered once: backends bound to the tensors as they are now."""

    __slots__ = ("bias", "by_backend", "convolve", "dtype", "extras", "positions", "runs", "values", "versions")

    def __init__(self, values: Tensor, bias: Tensor | None, positions: Mapping[str, Tensor | None]) -> None:
        self.values, self.bias, self.dtype = values, bias, values.dtype
        self.positions = tuple(positions.items())
        # Inference tensors count no versions.
        held = [t for t in (values, bias, *positions.values()) if t is not None and not t.is_inference()]
        self.versions = [(tensor, tensor._version) for tensor in held]
        self.runs: dict[int, Callable[[Tensor], Tensor]] = {}
        self.by_backend: dict[str, Callable[[Tensor], Tensor]] = {}
        # False where no backend convolves; None before it was asked for.
        self.convolve: Callable[..., Tensor] | Literal[False] | None = None
        self.extras: set[Callable[[Any], int]] = set()

    def stale(self, module: SparseModule) -> bool:
        """Whether a tensor was replaced or changed in place since (by an optimizer's step, for instance)."""
        parameters = module._parameters
        if parameters[module._value_name] is not self.values or parameters["bias"] is not self.bias:
            return True
        for tensor, version in self.versions:
            if tensor._version != version:
                return True
        buffers = module._buffers
        for name, tensor in self.positions:  # noqa: SIM110 - a generator takes longer
            if buffers[name] is not tensor:
                return True
        return False

    def moved(self, module: SparseModule) -> bool:
        """Whether positions did, and not only values or bias."""
        replaced = any(module._buffers[name] is not tensor for name, tensor in self.positions)
        places = {id(tensor) for _, tensor in self.positions}
        return replaced or any(t._version != version for t, version in self.versions if id(t) in places)


class SparseModule(nn.Module):
    """Base of the modules that host a `Packed`.

    `values` (of the dense layout `weight`) is a Parameter that asks for no gradient until the user turns it on, the
    other tensors are buffers, so that `state_dict` has `<name>.values`, `<name>.bitmask`, and so on. `weight` gives
    the dense weight in the shape of the replaced module: computed at each access, to be read only. `plan` is the
    choice made by measuring, `None` where dispatch decides by priority; `activations` is "int8" where inputs may be
    rounded to eight bits a row, at inference.
    """

    kind: ClassVar[str] = "linear"

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        # Under torch.compile discovery would be traced, so it happens before.
        dispatch.discover()
        # Scales may be stored in fewer bits than the layer computes in; a module's tensors have one dtype.
        packed = packed.astype(packed.dtype)
        self.layout = packed.layout
        self.shape_OI = packed.shape
        self.params = dict(packed.params)
        self.plan: tuple[tuple[int | None, str], ...] | None = None
        self.activations: str | None = None
        self._bound: _Bound | None = None
        # What comes from a file arrives later, in the empty tensors.
        self._checked = not packed.tensors[packed.value_name].is_meta
        self._value_name = packed.value_name
        for name, tensor in packed.tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
            else:
                self.register_buffer(name, tensor)
        self._tensor_names = tuple(packed.tensors)
        self.register_parameter("bias", None if bias is None else _parameter(bias))

    @property
    def packed(self) -> Packed:
        """The stored matrix as it is now, sharing the module's tensors."""
        tensors = {name: getattr(self, name) for name in self._tensor_names}
        return Packed(self.layout, self.shape_OI, tensors[self._value_name].dtype, tensors, dict(self.params))

    @property
    def density(self) -> float:
        """Share of positions with a stored number."""
        return self.packed.density

    @property
    def nbytes(self) -> int:
        """Bytes of the stored matrix, without the bias."""
        return self.packed.nbytes

    @property
    def derived_nbytes(self) -> int:
        """Bytes that the backends bound so far keep beside the stored matrix: positions or weights in another form."""
        return 0 if self._bound is None else sum(extra(self.packed) for extra in self._bound.extras)

    def dense_weight(self) -> Tensor:
        """The dense weight in the shape of the replaced module; gradients flow to `values`."""
        return base.unpack(self.packed)

    def to_dense(self) -> nn.Module:
        """An ordinary module with the same weights, zeros written out."""
        raise NotImplementedError

    def set_backends(self, plan: Sequence[tuple[int | None, str]] | None, *, activations: str | None = None) -> None:
        """Fix which backend runs how many rows: `[(16, "decode"), (None, "panel")]`; None leaves it to dispatch.

        Args:
            plan: pairs of the largest row count (None = any) and a backend's name, in ascending order; the last one
                also takes everything above.
            activations: "int8" lets a backend round inputs to eight bits, with a unit for each row; None does not.

        Raises:
            PumiceError: an empty plan, limits that do not ascend, a backend that does not exist, or activations of
                another kind.
        """
        if activations not in (None, "int8"):
            raise PumiceError(f"activations={activations!r} must be 'int8' or None.")
        if plan is not None:
            limits = [float("inf") if limit is None else limit for limit, _ in plan]
            if not plan or any(a >= b for a, b in itertools.pairwise(limits)):
                raise PumiceError(
                    f"plan={list(plan)!r} must be pairs (max_rows, backend) with ascending max_rows, None last."
                )
            for _, name in plan:
                dispatch.get("linear", self.layout, name)
        self.plan = None if plan is None else tuple((limit, name) for limit, name in plan)
        self.activations, self._bound = activations, None

    def _matmul(self, x: Tensor) -> Tensor:
        """x [..., I] to [..., O]; the caller's hot path."""
        o, i = self.shape_OI
        shape = x.shape
        if shape[-1] != i:
            raise PumiceError(f"x of shape {tuple(shape)} does not end in the layer's {i} inputs: {self!r}.")
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            return self._traced(x)
        bound = self._bound
        if bound is None or bound.stale(self):
            bound = self._bind()
        if torch.is_grad_enabled() and (
            x.requires_grad or bound.values.requires_grad or (bound.bias is not None and bound.bias.requires_grad)
        ):
            return self._traced(x)
        if x.dtype is not bound.dtype or torch.is_autocast_enabled(x.device.type):
            return self._other_dtype(x)
        if len(shape) == 2:
            return (bound.runs.get(shape[0]) or self._run_for(shape[0]))(x)
        if len(shape) == 3:
            # What language models call; slicing shapes would take a microsecond.
            batch, tokens, _ = shape
            rows = batch * tokens
            return (bound.runs.get(rows) or self._run_for(rows))(x.reshape(rows, i)).view(batch, tokens, o)
        rows = shape[:-1].numel()
        run = bound.runs.get(rows) or self._run_for(rows)
        return run(x.reshape(rows, i)).view(*shape[:-1], o)

    def infers(self, x: Tensor) -> bool:
        """Whether a prepared backend may run x: no gradients are wanted, and its type is the layer's."""
        learns = x.requires_grad or any(
            parameter.requires_grad for parameter in self._parameters.values() if parameter is not None
        )
        if (torch.is_grad_enabled() and learns) or torch.is_autocast_enabled(x.device.type):
            return False
        values = self._parameters[self._value_name]
        return values is not None and x.dtype is values.dtype and x.device == values.device

    def _traced(self, x: Tensor) -> Tensor:
        x_RI = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y_RO = dispatch.traced("linear", self.packed, self.bias, x_RI)
        return y_RO if x.dim() == 2 else y_RO.view(*x.shape[:-1], self.shape_OI[0])

    def _other_dtype(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            # F.linear casts both sides as autocast wants; kernels know nothing of it.
            return F.linear(x, base.unpack(self.packed), self.bias)
        raise PumiceError(
            f"x is {base.dtype_name(x.dtype)} and the layer stores {base.dtype_name(self.packed.dtype)}: bring the "
            f"model to one dtype with model.to(torch.{base.dtype_name(x.dtype)})."
        )

    def _bind(self) -> _Bound:
        if not self._checked or (self._bound is not None and self._bound.moved(self)):
            # New positions may contradict each other, and kernels read where these point.
            self._checked = False
            base.validate(self.packed, repr(self))
            self._checked = True
        values = self._parameters[self._value_name]
        assert values is not None
        self._bound = _Bound(values, self._parameters["bias"], self._buffers)
        return self._bound

    def _run_for(self, rows: int) -> Callable[[Tensor], Tensor]:
        """The backend for so many rows, bound on first use and shared by all row counts that get the same one."""
        bound, packed = self._bound, self.packed
        assert bound is not None
        if rows == 0:
            return lambda x_RI: x_RI.new_empty(0, self.shape_OI[0])
        where = (str(packed.device), rows, self.shape_OI, self.params, self.activations)
        call = dispatch.Call("linear", self.layout, bound.dtype, *where)
        backend = dispatch.choose(call) if self.plan is None else self._planned(rows, call)
        if backend.name not in bound.by_backend:
            bias = None if bound.bias is None else bound.bias.detach()
            # The tensors themselves, not detached ones: what is derived from them is found again by them.
            bound.by_backend[backend.name] = backend.prepare(packed, bias)
            bound.extras.add(backend.extra)
        if len(bound.runs) >= MAX_REMEMBERED:
            bound.runs.clear()
        bound.runs[rows] = run = bound.by_backend[backend.name]
        return run

    def _planned(self, rows: int, call: dispatch.Call) -> dispatch.Backend:
        assert self.plan is not None
        name = next((name for limit, name in self.plan if limit is None or rows <= limit), self.plan[-1][1])
        backend = dispatch.get("linear", self.layout, name)
        reason = backend.refuse(call)
        if reason is not None and not registry.layout.get(self.layout).extras["storable"]:
            # In another type, or on another CPU, a form for memory still has to run.
            return dispatch.choose(call)
        if reason is not None:
            raise PumiceError(
                f"backend {name!r} of the layer's plan refuses {rows} rows ({reason}): pack the model again."
            )
        return backend

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SparseModule:
        super()._apply(fn, recurse)
        self._bound = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._bound, self._checked = None, False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None}

    def __getattr__(self, name: str) -> Any:
        # Not a property: the dense layout has a Parameter of that name, which Module must be able to register.
        if name == "weight" and "_tensor_names" in self.__dict__ and "weight" not in self._parameters:
            return self.dense_weight()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and self.__dict__.get("layout", "dense") != "dense":
            raise PumiceError(
                f"weight of {type(self).__name__} cannot be set: make a new one with {type(self).__name__}.from_module, "
                f"or change `values` in place."
            )
        super().__setattr__(name, value)

    def _stored_repr(self) -> str:
        return f"layout={self.layout}, density={self.density:.3f}, bytes={self.nbytes}"


def _parameter(bias: Tensor) -> nn.Parameter:
    return bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
