"""Modules that hold a stored matrix in any layout and run it through whatever backend dispatch gives them.

Shapes: B batch, R rows of x, O outputs, I inputs (kernel positions included).
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core import dispatch
from pumice.core.errors import PumiceError
from pumice.weights.layouts import base
from pumice.weights.layouts.base import Packed

# Row counts remembered per layer; a server sees thousands of prompt lengths, not millions.
MAX_REMEMBERED = 4096


class _Bound:
    """What the hot path needs of one layer, gathered once: backends bound to the tensors as they are now."""

    __slots__ = ("bias", "by_backend", "dtype", "runs", "values", "version")

    def __init__(self, values: Tensor, bias: Tensor | None) -> None:
        self.values, self.bias, self.dtype = values, bias, values.dtype
        # Inference tensors count no versions.
        self.version = None if values.is_inference() else values._version
        self.runs: dict[int, Callable[[Tensor], Tensor]] = {}
        self.by_backend: dict[str, Callable[[Tensor], Tensor]] = {}

    def stale(self, parameters: Mapping[str, Tensor | None], name: str) -> bool:
        """Whether values or bias were replaced or changed in place since (an optimizer's step, for instance)."""
        if parameters[name] is not self.values or parameters["bias"] is not self.bias:
            return True
        return self.version is not None and self.values._version != self.version


class SparseModule(nn.Module):
    """Base of the modules that host a `Packed`.

    `values` (of the dense layout `weight`) is a Parameter that asks for no gradient until the user turns it on, the
    other tensors are buffers, so that `state_dict` has `<name>.values`, `<name>.bitmask`, and so on. `weight` gives
    the dense weight in the shape of the replaced module: computed at each access, to be read only. `plan` is the
    choice made by measuring, `None` where dispatch decides by priority.
    """

    kind: ClassVar[str] = "linear"

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        # Under torch.compile discovery would be traced, so it happens before.
        dispatch.discover()
        self.layout = packed.layout
        self.shape_OI = packed.shape
        self.params = dict(packed.params)
        self.plan: tuple[tuple[int | None, str], ...] | None = None
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

    def dense_weight(self) -> Tensor:
        """The dense weight in the shape of the replaced module; gradients flow to `values`."""
        return base.unpack(self.packed)

    def to_dense(self) -> nn.Module:
        """An ordinary module with the same weights, zeros written out."""
        raise NotImplementedError

    def set_backends(self, plan: Sequence[tuple[int | None, str]] | None) -> None:
        """Fix which backend runs how many rows: `[(16, "decode"), (None, "panel")]`; None leaves it to dispatch.

        Args:
            plan: pairs of the largest row count (None = any) and a backend's name, in ascending order; the last one
                also takes everything above.

        Raises:
            PumiceError: an empty plan, limits that do not ascend, or a backend that does not exist.
        """
        if plan is not None:
            limits = [float("inf") if limit is None else limit for limit, _ in plan]
            if not plan or any(a >= b for a, b in itertools.pairwise(limits)):
                raise PumiceError(
                    f"plan={list(plan)!r} must be pairs (max_rows, backend) with ascending max_rows, None last."
                )
            for _, name in plan:
                dispatch.get("linear", self.layout, name)
        self.plan = None if plan is None else tuple((limit, name) for limit, name in plan)
        self._bound = None

    def _matmul(self, x: Tensor) -> Tensor:
        """x [..., I] to [..., O]; the caller's hot path."""
        o, i = self.shape_OI
        shape = x.shape
        if shape[-1] != i:
            raise PumiceError(f"x of shape {tuple(shape)} does not end in the layer's {i} inputs: {self!r}.")
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            return self._traced(x)
        bound = self._bound
        if bound is None or bound.stale(self._parameters, self._value_name):
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
        if not self._checked:
            base.validate(self.packed, repr(self))
            self._checked = True
        values = self._parameters[self._value_name]
        assert values is not None
        self._bound = _Bound(values, self._parameters["bias"])
        return self._bound

    def _run_for(self, rows: int) -> Callable[[Tensor], Tensor]:
        """The backend for so many rows, bound on first use and shared by all row counts that get the same one."""
        bound, packed = self._bound, self.packed
        assert bound is not None
        if rows == 0:
            return lambda x_RI: x_RI.new_empty(0, self.shape_OI[0])
        call = dispatch.Call("linear", self.layout, bound.dtype, str(packed.device), rows, self.shape_OI, self.params)
        backend = dispatch.choose(call) if self.plan is None else self._planned(rows, call)
        if backend.name not in bound.by_backend:
            bias = None if bound.bias is None else bound.bias.detach()
            detached = {name: tensor.detach() for name, tensor in packed.tensors.items()}
            packed = Packed(packed.layout, packed.shape, packed.dtype, detached, packed.params)
            bound.by_backend[backend.name] = backend.prepare(packed, bias)
        if len(bound.runs) >= MAX_REMEMBERED:
            bound.runs.clear()
        bound.runs[rows] = run = bound.by_backend[backend.name]
        return run

    def _planned(self, rows: int, call: dispatch.Call) -> dispatch.Backend:
        assert self.plan is not None
        name = next((name for limit, name in self.plan if limit is None or rows <= limit), self.plan[-1][1])
        backend = dispatch.get("linear", self.layout, name)
        reason = backend.refuse(call)
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
        # New positions may contradict each other, and kernels read where these point.
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


class SparseLinear(SparseModule):
    """`y = x W^T + b` with W stored in any layout; takes the place of `nn.Linear` and of GPT-2's `Conv1D`."""

    def __init__(self, packed: Packed, bias: Tensor | None = None, *, transposed: bool = False) -> None:
        super().__init__(packed, bias)
        self.out_features, self.in_features = packed.shape
        self.transposed = transposed
        if transposed:
            self.nf, self.nx = packed.shape

    @classmethod
    def from_module(cls, module: nn.Module, packed: Packed) -> SparseLinear:
        """The sparse twin of a `Linear` or `Conv1D`, sharing its bias; training mode is kept.

        Raises:
            PumiceError: another kind of module, or a stored matrix of another shape.
        """
        transposed = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        if not transposed and not isinstance(module, nn.Linear):
            raise PumiceError(
                f"module={type(module).__name__} is neither Linear nor Conv1D: SparseLinear cannot replace it."
            )
        linear = cast(nn.Linear, module)
        shape = tuple(linear.weight.shape)
        _check_shape(module, packed, shape[::-1] if transposed else shape)
        return cls(packed, linear.bias, transposed=transposed).train(module.training)

    def dense_weight(self) -> Tensor:
        weight_OI = super().dense_weight()
        return weight_OI.t() if self.transposed else weight_OI

    def to_dense(self) -> nn.Module:
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                module: nn.Module = Conv1D(*self.shape_OI)
        else:
            module = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        return _fill(module, self)

    def forward(self, x: Tensor) -> Tensor:
        return self._matmul(x)

    def extra_repr(self) -> str:
        o, i = self.shape_OI
        return f"in_features={i}, out_features={o}, bias={self.bias is not None}, {self._stored_repr()}"


class SparseConv2d(SparseModule):
    """`nn.Conv2d` with its weight, flattened to [O, I], stored in any layout.

    A plain 1 x 1 convolution is a linear layer over pixels and runs through the sparse kernels. Any other one unpacks
    its weight for each call and convolves densely: it saves bytes, not time (`runs_sparse` tells which).
    """

    kind: ClassVar[str] = "conv2d"

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None,
        *,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__(packed, bias)
        self.out_channels = packed.shape[0]
        self.in_channels = packed.shape[1] // (kernel_size[0] * kernel_size[1]) * groups
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.groups, self.padding_mode = groups, padding_mode
        # nn.Conv2d's own convolution reads this where the padding is not with zeros.
        self._reversed_padding_repeated_twice = self._empty_twin()._reversed_padding_repeated_twice

    def _empty_twin(self) -> nn.Conv2d:
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias=self.bias is not None,
            padding_mode=cast(Any, self.padding_mode),
            device="meta",
        )

    @classmethod
    def from_module(cls, module: nn.Module, packed: Packed) -> SparseConv2d:
        """The sparse twin of a `Conv2d`, sharing its bias; training mode is kept.

        Raises:
            PumiceError: another kind of module, or a stored matrix of another shape.
        """
        if not isinstance(module, nn.Conv2d):
            raise PumiceError(f"module={type(module).__name__} is no Conv2d: SparseConv2d cannot replace it.")
        _check_shape(module, packed, (module.weight.shape[0], module.weight.shape[1:].numel()))
        settings = {key: getattr(module, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")}
        sparse = cls(packed, module.bias, kernel_size=module.kernel_size, **settings)  # type: ignore[arg-type]
        return sparse.train(module.training)

    @property
    def runs_sparse(self) -> bool:
        """Whether the sparse kernels run it, so that time is saved and not only bytes."""
        return (
            self.kernel_size == (1, 1)
            and self.stride == (1, 1)
            and self.groups == 1
            and self.padding in ((0, 0), "valid", "same")
        )

    def dense_weight(self) -> Tensor:
        return super().dense_weight().unflatten(1, (-1, *self.kernel_size))

    def to_dense(self) -> nn.Module:
        return _fill(self._empty_twin(), self)

    def forward(self, x: Tensor) -> Tensor:
        if self.runs_sparse:
            return self._matmul(x.movedim(-3, -1)).movedim(-1, -3)
        return nn.Conv2d._conv_forward(cast(Any, self), x, self.dense_weight(), self.bias)

    def extra_repr(self) -> str:
        how = "sparse" if self.runs_sparse else "dense (saves bytes, not time)"
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, bias={self.bias is not None}, runs {how}, {self._stored_repr()}"
        )


def sparse_twin(module: nn.Module) -> type[SparseLinear] | type[SparseConv2d] | None:
    """The class that can stand in for a module, or None where its weight has to stay dense in memory.

    Subclasses are left alone: they exist because they do or expect something else.
    """
    if type(module) is nn.Linear:
        return SparseLinear
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return SparseLinear
    return SparseConv2d if type(module) is nn.Conv2d else None


@cache
def _forward_source(cls: type[nn.Module]) -> str:
    try:
        return inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return ""


def reads_weight(model: nn.Module, name: str) -> bool:
    """Whether the parent of a layer looks at the layer's weight at every call, as T5 does at `self.wo.weight.dtype`.

    A sparse module would unpack its weight each time, so such a layer is better left dense in memory. Told from the
    source of the parent's `forward`; where there is none the answer is no.
    """
    parent, _, leaf = name.rpartition(".")
    if not leaf or leaf.isdigit():
        return False
    source = _forward_source(type(model.get_submodule(parent)))
    return re.search(rf"\bself\.{re.escape(leaf)}\.weight\b", source) is not None


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` where `name` is in the model; returns the model, which is `new` itself when the name is empty."""
    if not name:
        return new
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model


def densify(model: nn.Module) -> nn.Module:
    """Every sparse module of a model as an ordinary dense one, in place; returns the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseModule):
            model = replace_module(model, name, module.to_dense())
    return model


def _parameter(bias: Tensor) -> nn.Parameter:
    return bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)


def _check_shape(module: nn.Module, packed: Packed, shape: tuple[int, ...]) -> None:
    if packed.shape != shape:
        raise PumiceError(
            f"a stored matrix of shape {packed.shape} cannot replace the weight {tuple(shape)} of {type(module).__name__}: "
            f"it belongs to another layer or model."
        )


def _fill(module: nn.Module, sparse: SparseModule) -> nn.Module:
    with torch.no_grad():
        module.weight = nn.Parameter(sparse.dense_weight().detach().clone(memory_format=torch.contiguous_format))
    module.bias = sparse.bias
    return module.train(sparse.training)
