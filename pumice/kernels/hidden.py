"""The hidden layer of experts on its own, for training: the ops "activate" and "activate_backward" and their backends.

What they compute is `activate` and `activate_backward` of `pumice.core.activation`, but that the backward pass writes the
scaled hidden layer over its gradient: new memory costs more than the pass. A backend is prepared as `prepare(form, None)`
and runs as `run(products)` or `run(products, gradient, scale_A) -> (to_products, to_scale)`. A call's rows are the
assignments, its shape (F, numbers of a row of the products).
Legend: A assignments, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.core import activation, dispatch
from pumice.core.dispatch import Backend, Call, Run, limits, register
from pumice.kernels.cpu_backend import CODES, PRODUCTS, missing, native
from pumice.kernels.grouped_cpu import ACTIVATIONS, address, places

Form = tuple[str, str, float, float]
"""Activation, gate ("none", "halves": first all gates, then all partners, "pairs": they alternate), alpha, limit."""


def _prepare(form: Any, _: Tensor | None) -> Run:
    return lambda products: activation.activate(products, *form).contiguous()


def _prepare_backward(form: Any, _: Tensor | None) -> Any:
    def run(products: Tensor, gradient: Tensor, scale_A: Tensor | None) -> tuple[Tensor, Tensor | None]:
        hidden, to_products, to_scale = activation.activate_backward(products, gradient, scale_A, *form)
        gradient.copy_(hidden)
        return to_products, to_scale

    return run


def _refuse(call: Call) -> str | None:
    return limits(call, devices=("cpu",), dtypes=PRODUCTS) or missing()


def _native(products: Tensor, form: Form, hidden: Tensor, *more: int) -> None:
    act, gate, alpha, limit = form
    first, step = places(gate, hidden.shape[1])
    native.hidden(
        *(products.data_ptr(), hidden.shape[1], first, step, ACTIVATIONS.index(act)),
        *(round(alpha * 1e6), round(limit * 1e6), hidden.data_ptr(), *more, products.shape[0]),
        *(CODES[products.dtype], torch.get_num_threads()),
    )


def native_activate(products: Tensor, form: Form, out: Tensor) -> None:
    """The hidden layer of contiguous products into `out`."""
    _native(products, form, out, 0, 0, 0, 0)


def native_backward(
    products: Tensor,
    form: Form,
    gradient: Tensor,
    scale_A: Tensor | None,
    to_products: Tensor,
    to_scale: Tensor | None,
) -> None:
    """`activate_backward` of contiguous tensors: the hidden layer over its gradient, and into the last two."""
    scale_A = None if scale_A is None else scale_A.to(torch.float32).contiguous()
    scales = address(scale_A), address(to_scale)
    _native(products, form, gradient, gradient.data_ptr(), scales[0], to_products.data_ptr(), scales[1])


def _width(products: Tensor, gate: str) -> int:
    return products.shape[1] // (1 if gate == "none" else 2)


def _prepare_native(form: Any, _: Tensor | None) -> Run:
    def run(products: Tensor) -> Tensor:
        hidden = products.new_empty(products.shape[0], _width(products, form[1]))
        native_activate(products.contiguous(), form, hidden)
        return hidden

    return run


def _prepare_native_backward(form: Any, _: Tensor | None) -> Any:
    def run(products: Tensor, gradient: Tensor, scale_A: Tensor | None) -> tuple[Tensor, Tensor | None]:
        products, hidden = products.contiguous(), gradient.contiguous()
        to_products = torch.empty_like(products)
        to_scale = None if scale_A is None else torch.empty(scale_A.shape)
        native_backward(products, form, hidden, scale_A, to_products, to_scale)
        if hidden is not gradient:
            gradient.copy_(hidden)
        return to_products, to_scale

    return run


register(Backend("torch", "activate", "dense", lambda call: None, _prepare, 0, "PyTorch"))
register(Backend("native", "activate", "dense", _refuse, _prepare_native, 30, "C++: one pass"))
register(Backend("torch", "activate_backward", "dense", lambda call: None, _prepare_backward, 0, "PyTorch"))
register(Backend("native", "activate_backward", "dense", _refuse, _prepare_native_backward, 30, "C++: one pass"))


def _choose(op: str, products: Tensor, gate: str) -> Backend:
    shape = (_width(products, gate), products.shape[1])
    return dispatch.choose(Call(op, "dense", products.dtype, str(products.device), products.shape[0], shape))


@torch.library.custom_op(
    "pumice::activate",
    mutates_args=(),
    schema="(Tensor products, str act, str gate, float alpha, float limit) -> Tensor",
)
def activate(products: Tensor, act: str, gate: str, alpha: float, limit: float) -> Tensor:
    """`activation.activate` by the best backend; it has no gradient of its own."""
    return _choose("activate", products, gate).prepare((act, gate, alpha, limit), None)(products)


@activate.register_fake
def _(products: Tensor, act: str, gate: str, alpha: float, limit: float) -> Tensor:
    return products.new_empty(products.shape[0], _width(products, gate))


@torch.library.custom_op(
    "pumice::activate_backward",
    mutates_args=("gradient",),
    schema="(Tensor products, Tensor(a!) gradient, Tensor? scale, str act, str gate, float alpha, float limit) -> "
    "(Tensor, Tensor)",
)
def activate_backward(
    products: Tensor, gradient: Tensor, scale: Tensor | None, act: str, gate: str, alpha: float, limit: float
) -> tuple[Tensor, Tensor]:
    """`activation.activate_backward` by the best backend, the hidden layer in place of its gradient.

    Without a scale its gradient is empty.
    """
    run: Any = _choose("activate_backward", products, gate).prepare((act, gate, alpha, limit), None)
    to_products, to_scale = run(products, gradient, scale)
    return to_products, products.new_empty(0) if to_scale is None else to_scale


@activate_backward.register_fake
def _(
    products: Tensor, gradient: Tensor, scale: Tensor | None, act: str, gate: str, alpha: float, limit: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(products.dtype, torch.float32)
    to_scale = products.new_empty(0) if scale is None else products.new_empty(scale.shape[0], dtype=wide)
    return torch.empty_like(products), to_scale
