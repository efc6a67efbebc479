"""`SparseLinear` and `SparseConv2d`, and how they take the place of ordinary layers.

Shapes: B batch, O outputs, I inputs (kernel positions included).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pumice.core import dispatch
from pumice.core.convolution import Convolution
from pumice.core.errors import PumiceError
from pumice.core.view import WeightView
from pumice.weights.grid import keep
from pumice.weights.layouts.base import Packed, grid_of
from pumice.weights.sparse_module import SparseModule
from pumice.weights.wrapped import Substitute

__all__ = [
    "SparseConv2d",
    "SparseLinear",
    "SparseModule",
    "densify",
    "reads_weight",
    "replace_module",
    "sparse_twin",
]


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

    At inference the weight stays packed where a kernel convolves it (the op `conv2d`; none does in groups). Elsewhere, with
    gradients, in a graph or under autocast, the weight is unpacked for each call and convolved densely, a plain 1 x 1
    convolution excepted, which is a linear layer over pixels: that saves bytes, not time (`runs_sparse` tells which).
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
    def how(self) -> Convolution:
        """What the op `conv2d` takes beside the weight."""
        return Convolution.of(self.kernel_size, self.stride, self.padding, self.dilation, self.groups)

    @property
    def runs_sparse(self) -> bool:
        """Whether the sparse kernels run it, so that time is saved and not only bytes."""
        return self._pixelwise or self._backend() is not None

    @property
    def _pixelwise(self) -> bool:
        plain = self.kernel_size == (1, 1) and self.stride == (1, 1) and self.groups == 1
        return plain and self.padding in ((0, 0), "valid", "same")

    def _backend(self) -> dispatch.Backend | None:
        packed, params = self.packed, {**self.how.params, "zeros": int(self.padding_mode == "zeros")}
        call = dispatch.Call("conv2d", self.layout, packed.dtype, str(packed.device), 1, packed.shape, params)
        return next((backend for backend, reason in dispatch.candidates(call) if reason is None), None)

    def convolution(self) -> Callable[..., Tensor] | None:
        """`run(x_NCHW, how) -> y_NOHW` by the kernel that convolves the packed weight, bound to it as it is now, or None."""
        bound = self._bound
        if bound is None or bound.stale(self):
            bound = self._bind()
        if bound.convolve is None:
            backend = self._backend()
            bound.convolve = False
            if backend is not None:
                bound.convolve = backend.prepare(self.packed, None if bound.bias is None else bound.bias.detach())
                bound.extras.add(backend.extra)
        return bound.convolve or None

    def dense_weight(self) -> Tensor:
        return super().dense_weight().unflatten(1, (-1, *self.kernel_size))

    def to_dense(self) -> nn.Module:
        return _fill(self._empty_twin(), self)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and type(x) is Tensor and x.dim() == 4 and self.infers(x):
            run = self.convolution()
            if run is not None:
                return run(x, self.how)
        if self._pixelwise:
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
    """Every sparse or wrapped module of a model as an ordinary dense one, in place; returns the model."""
    replaced: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        # What a substitute was made of is gone with it.
        if isinstance(module, SparseModule | Substitute) and not name.startswith(replaced):
            model = replace_module(model, name, module.to_dense())
            replaced = (*replaced, f"{name}.") if name else ("",)
    return model


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
    grid = grid_of(sparse.packed)
    if grid is not None:
        keep(WeightView("weight", "", module), grid)
    return module.train(sparse.training)
