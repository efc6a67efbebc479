"""The perceptron of every expert with gradients: the operator "expert_mlp_trained" and its backends.

Forward keeps the products with `up`, and nothing else of the hidden layer, for the backward pass. That makes the hidden
layer again in the pass that turns its gradient into those of the products and of the scales (`hidden.py`). The C++
backend goes through the experts a few at a time, so that what lies between two products stays in cache and takes no new
memory, which costs more than to compute what is in it.

A backend of the op "expert_mlp_trained" is prepared as `prepare((up, down, form), None)` and runs as
`run(x, routed, biases) -> (y, products)`; one of "expert_mlp_backward" is prepared alike and runs as
`run(g, x, products, routed, want) -> Gradients`. A call's rows are the assignments, its
shape (F, D), its `experts` a parameter. Second derivatives are not there.
Legend: T tokens, D model width, F hidden width, E experts, A assignments sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pumice.core import dispatch
from pumice.core.dispatch import Backend, Call, register
from pumice.kernels import grouped_cpu, hidden
from pumice.kernels.grouped import bias_gradient, bias_products, grouped_linear, grouped_outer
from pumice.kernels.grouped_cpu import PLAIN, outer, stage
from pumice.kernels.hidden import activate, activate_backward

CHUNK_ROWS = 192
"""Assignments for each thread that go through all products before the next."""


Biases = tuple[Tensor | None, Tensor | None]


class Routed(NamedTuple):
    """A plan: `offsets_E1`, the token of each assignment (None: its own row of x and y), and what its result is scaled by."""

    offsets: Tensor
    token: Tensor | None
    scale: Tensor | None


@dataclass(frozen=True)
class Want:
    """Which gradients are wanted."""

    x: bool
    up: bool
    down: bool
    up_bias: bool


@dataclass
class Gradients:
    """Of x, up, down, the bias of `up`, and of the scales without the part of the bias of `down`; None if not wanted."""

    x: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    up_bias: Tensor | None = None
    scale: Tensor | None = None


def _prepare(state: Any, _: Tensor | None) -> Any:
    up, down, form = state

    def run(x: Tensor, routed: Routed, biases: Biases) -> tuple[Tensor, Tensor]:
        (offsets, token, scale), (up_bias, down_bias) = routed, biases
        products = grouped_linear(x, up, offsets, up_bias, token, None, None, 0)
        rows = 0 if token is None else x.shape[0]
        return grouped_linear(activate(products, *form), down, offsets, down_bias, None, token, scale, rows), products

    return run


def _prepare_backward(state: Any, _: Tensor | None) -> Any:
    up, down, form = state

    def run(g: Tensor, x: Tensor, products: Tensor, routed: Routed, want: Want) -> Gradients:
        offsets, token, scale = routed
        made = Gradients()
        middle = grouped_linear(g, down.transpose(1, 2), offsets, None, token, None, None, 0)
        to_products, made.scale = activate_backward(products, middle, scale, *form)
        if want.down:
            made.down = grouped_outer(g, middle, offsets, token, None)
        if want.x:
            rows = 0 if token is None else x.shape[0]
            made.x = grouped_linear(to_products, up.transpose(1, 2), offsets, None, None, token, None, rows)
        if want.up:
            made.up = grouped_outer(to_products, x, offsets, None, token)
        if want.up_bias:
            made.up_bias = bias_gradient(to_products, offsets)
        return made

    return run


@dataclass(frozen=True)
class _Chunk:
    """Experts [first, last) of a plan, whose assignments are [begin, end)."""

    first: int
    last: int
    begin: int
    end: int

    @property
    def experts(self) -> slice:
        return slice(self.first, self.last)

    @property
    def rows(self) -> slice:
        return slice(self.begin, self.end)

    def offsets(self, offsets: Tensor) -> Tensor:
        return offsets[self.first : self.last + 1] - self.begin

    def of(self, tensor_A: Tensor | None) -> Tensor | None:
        return None if tensor_A is None else tensor_A[self.rows]


def _chunks(offsets: Tensor) -> list[_Chunk]:
    """As few experts at a time as have rows enough for all threads, and the rest with the last."""
    bounds, least = offsets.tolist(), CHUNK_ROWS * torch.get_num_threads()
    starts, total = [0], bounds[-1]
    for expert in range(1, len(bounds) - 1):
        if bounds[expert] - bounds[starts[-1]] >= least and total - bounds[expert] >= least:
            starts.append(expert)
    ends = [*starts[1:], len(bounds) - 1]
    return [_Chunk(a, b, bounds[a], bounds[b]) for a, b in zip(starts, ends, strict=True)]


def _spaces(chunks: list[_Chunk], width: int, like: Tensor) -> Iterator[Tensor]:
    """[rows of the chunk, width] of the same memory for every chunk."""
    space = like.new_empty(max(chunk.end - chunk.begin for chunk in chunks), width)
    for chunk in chunks:
        yield space[: chunk.end - chunk.begin]


def _sums(rows: int, width: int, like: Tensor) -> Tensor:
    return torch.zeros(rows, width, dtype=torch.float32, device=like.device)


def _prepare_native(state: Any, _: Tensor | None) -> Any:
    up, down, form = state

    def run(x: Tensor, routed: Routed, biases: Biases) -> tuple[Tensor, Tensor]:
        offsets, token, scale = routed
        assignments = x.shape[0] if token is None else token.shape[0]
        products = x.new_empty(assignments, up.shape[1])
        y = x.new_empty(assignments, down.shape[1]) if token is None else _sums(x.shape[0], down.shape[1], x)
        chunks = _chunks(offsets)
        for chunk, middle in zip(chunks, _spaces(chunks, down.shape[2], x), strict=True):
            part = chunk.offsets(offsets)
            up_bias, down_bias = (None if bias is None else bias[chunk.experts] for bias in biases)
            rows = x[chunk.rows] if token is None else x
            stage(rows, up[chunk.experts], part, up_bias, PLAIN, chunk.of(token), out=products[chunk.rows])
            hidden.native_activate(products[chunk.rows], form, middle)
            more = (PLAIN, None, chunk.of(token), chunk.of(scale))
            stage(middle, down[chunk.experts], part, down_bias, *more, out=y[chunk.rows] if token is None else y)
        return y.to(x.dtype), products

    return run


def _prepare_native_backward(state: Any, _: Tensor | None) -> Any:
    up, down, form = state

    def run(g: Tensor, x: Tensor, products: Tensor, routed: Routed, want: Want) -> Gradients:
        offsets, token, scale = routed
        made, chunks = Gradients(), _chunks(offsets)
        if want.x:
            made.x = torch.empty_like(x) if token is None else _sums(x.shape[0], x.shape[1], x)
        made.up = torch.empty(up.shape, dtype=up.dtype) if want.up else None
        made.down = torch.empty(down.shape, dtype=down.dtype) if want.down else None
        made.up_bias = up.new_empty(up.shape[:2]) if want.up_bias else None
        made.scale = None if scale is None else torch.empty(scale.shape)
        spaces = _spaces(chunks, down.shape[2], x), _spaces(chunks, up.shape[1], x)
        for chunk, middle, to_products in zip(chunks, *spaces, strict=True):
            part, rows = chunk.offsets(offsets), chunk.of(token)
            g_rows, x_rows = (g[chunk.rows], x[chunk.rows]) if token is None else (g, x)
            stage(g_rows, down[chunk.experts].transpose(1, 2), part, None, PLAIN, rows, out=middle)
            hidden.native_backward(
                products[chunk.rows], form, middle, chunk.of(scale), to_products, chunk.of(made.scale)
            )
            if made.down is not None:
                outer(g_rows, middle, part, rows, None, out=made.down[chunk.experts])
            if made.x is not None:
                out = made.x[chunk.rows] if token is None else made.x
                stage(to_products, up[chunk.experts].transpose(1, 2), part, None, PLAIN, None, rows, out=out)
            if made.up is not None:
                outer(to_products, x_rows, part, None, rows, out=made.up[chunk.experts])
            if made.up_bias is not None:
                made.up_bias[chunk.experts] = bias_gradient(to_products, part)
        made.x = None if made.x is None else made.x.to(x.dtype)
        return made

    return run


for _op, _make, _native in (
    ("expert_mlp_trained", _prepare, _prepare_native),
    ("expert_mlp_backward", _prepare_backward, _prepare_native_backward),
):
    register(Backend("parts", _op, "dense", lambda call: None, _make, 0, "one operator after another"))
    register(Backend("native", _op, "dense", grouped_cpu.refuse, _native, 30, "C++: a few experts at a time"))


def _run(op: str, up: Tensor, down: Tensor, form: Any, assignments: int) -> Any:
    shape, params = (down.shape[2], down.shape[1]), {"experts": up.shape[0]}
    call = Call(op, "dense", up.dtype, str(up.device), assignments, shape, params)
    return dispatch.choose(call).prepare((up, down, form), None)


@torch.library.custom_op(
    "pumice::expert_mlp_trained",
    mutates_args=(),
    schema="(Tensor x, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, Tensor offsets, Tensor? token, "
    "Tensor? scale, str act, str gate, float alpha, float limit) -> (Tensor, Tensor)",
)
def expert_mlp_trained(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    offsets: Tensor,
    token: Tensor | None,
    scale: Tensor | None,
    act: str,
    gate: str,
    alpha: float,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """`expert_mlp` with gradients, and the products with `up`, which have none: they are for the backward pass."""
    assignments = x.shape[0] if token is None else token.shape[0]
    run = _run("expert_mlp_trained", up, down, (act, gate, alpha, limit), assignments)
    return run(x, Routed(offsets, token, scale), (up_bias, down_bias))


@expert_mlp_trained.register_fake
def _(
    x: Tensor, up: Tensor, down: Tensor, up_bias: Any, down_bias: Any, offsets: Tensor, token: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    assignments = x.shape[0] if token is None else token.shape[0]
    return x.new_empty(x.shape[0], down.shape[1]), x.new_empty(assignments, up.shape[1])


@torch.library.custom_op(
    "pumice::expert_mlp_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor x, Tensor up, Tensor down, Tensor products, Tensor offsets, Tensor? token, Tensor? scale, "
    "bool[] want, str act, str gate, float alpha, float limit) -> Tensor[]",
)
def expert_mlp_backward(
    g: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    products: Tensor,
    offsets: Tensor,
    token: Tensor | None,
    scale: Tensor | None,
    want: list[bool],
    act: str,
    gate: str,
    alpha: float,
    limit: float,
) -> list[Tensor]:
    """The gradients of x, up, down, the bias of `up` and the scales; empty where not wanted, or without scales."""
    run = _run("expert_mlp_backward", up, down, (act, gate, alpha, limit), products.shape[0])
    made: Gradients = run(g, x, products, Routed(offsets, token, scale), Want(*want))
    found = (made.x, made.up, made.down, made.up_bias, made.scale)
    return [x.new_empty(0) if gradient is None else gradient for gradient in found]


@expert_mlp_backward.register_fake
def _(
    g: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    products: Tensor,
    offsets: Tensor,
    token: Tensor | None,
    scale: Tensor | None,
    want: list[bool],
    *_: Any,
) -> list[Tensor]:
    shapes = (x.shape, up.shape, down.shape, up.shape[:2])
    made = [x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, want, strict=True)]
    wide = torch.promote_types(x.dtype, torch.float32)
    return [*made, x.new_empty(0) if scale is None else x.new_empty(scale.shape, dtype=wide)]


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.form = inputs[8:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *inputs[4:8], output[1])


def _backward(ctx: Any, g: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 12
    x, up, down, down_bias, offsets, token, scale, products = ctx.saved_tensors
    to_x, to_up, to_down, to_up_bias, to_down_bias, _, _, to_scale = ctx.needs_input_grad[:8]
    g = g.contiguous()
    g_down_bias = g_scale = None
    made: list[Tensor | None] = [None] * 5
    if to_x or to_up or to_down or to_up_bias or to_scale:
        want = [to_x, to_up, to_down, to_up_bias]
        found = expert_mlp_backward(g, x, up, down, products, offsets, token, scale, want, *ctx.form)
        made = [gradient if wanted else None for gradient, wanted in zip(found, [*want, to_scale], strict=True)]
    g_scale = None if made[4] is None else made[4].to(scale.dtype)
    if to_down_bias or (g_scale is not None and down_bias is not None):
        g_AD = g if token is None else g[token]
        if g_scale is not None:
            g_scale = g_scale + bias_products(g_AD, down_bias, offsets, scale.dtype)
        if to_down_bias:
            g_down_bias = bias_gradient(g_AD if scale is None else (g_AD * scale[:, None]).to(g.dtype), offsets)
    return *made[:4], g_down_bias, None, None, g_scale, None, None, None, None


expert_mlp_trained.register_autograd(_backward, setup_context=_context)
