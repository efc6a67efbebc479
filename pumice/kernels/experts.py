"""The whole perceptron of every expert of a plan: the op "expert_mlp" and its backends.

`up` [E, F or 2F, D] and `down` [E, D, F] may have any strides. A backend is prepared as `prepare((up, down, form),
None)` and runs as `run(x, offsets_E1, token_A, scale_A, up_bias, down_bias)`; without `token_A` assignment a is row a of
x and of the result. A call's rows are the assignments, its shape (F, D), its `experts` a parameter. That is for inference.
Training has an operator of its own (`experts_trained.py`).
Legend: T tokens, D model width, F hidden width, E experts, A assignments sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.core import activation, dispatch
from pumice.core.dispatch import Backend, Call, Run, register
from pumice.kernels import grouped_cpu
from pumice.kernels.experts_trained import expert_mlp_trained
from pumice.kernels.grouped import choose
from pumice.kernels.grouped_cpu import ACTIVATE, ACTIVATIONS, GATE, PLAIN, Finish, stage


def _prepare_parts(state: Any, _: Tensor | None) -> Run:
    up, down, form = state

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, offsets_E1: Tensor, *more: Any) -> Tensor:
        assignments = x.shape[0] if more[0] is None else more[0].shape[0]
        backend = choose("grouped_linear", x, assignments, weight.shape[0], (weight.shape[1], weight.shape[2]))
        return backend.prepare(weight, bias)(x, offsets_E1, *more)

    def run(
        x: Tensor,
        offsets_E1: Tensor,
        token_A: Tensor | None,
        scale_A: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        hidden = activation.activate(linear(x, up, up_bias, offsets_E1, token_A, None, None, 0), *form)
        return linear(hidden, down, down_bias, offsets_E1, None, token_A, scale_A, x.shape[0])

    return run


def _prepare_native(state: Any, _: Tensor | None) -> Run:
    up, down, (act, gate, alpha, limit) = state
    width = down.shape[2]
    first, step = grouped_cpu.places(gate, width)
    hidden = Finish(ACTIVATE if gate == "none" else GATE, ACTIVATIONS.index(act), first, step, alpha, limit)

    def run(
        x: Tensor,
        offsets_E1: Tensor,
        token_A: Tensor | None,
        scale_A: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        hidden_AF = stage(x, up, offsets_E1, up_bias, hidden, token_A)
        return stage(hidden_AF, down, offsets_E1, down_bias, PLAIN, None, token_A, scale_A, x.shape[0])

    return run


register(Backend("parts", "expert_mlp", "dense", lambda call: None, _prepare_parts, 0, "two grouped products"))
register(
    Backend("native", "expert_mlp", "dense", grouped_cpu.refuse, _prepare_native, 30, "C++: activation in the product")
)


@torch.library.custom_op(
    "pumice::expert_mlp",
    mutates_args=(),
    schema="(Tensor x, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, Tensor offsets, Tensor? token, "
    "Tensor? scale, str act, str gate, float alpha, float limit) -> Tensor",
)
def expert_mlp(
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
) -> Tensor:
    """`reference.expert_mlp` by the best backend."""
    assignments = x.shape[0] if token is None else token.shape[0]
    shape = (down.shape[2], down.shape[1])
    call = Call("expert_mlp", "dense", x.dtype, str(x.device), assignments, shape, {"experts": up.shape[0]})
    run = dispatch.choose(call).prepare((up, down, (act, gate, alpha, limit)), None)
    return run(x, offsets, token, scale, up_bias, down_bias)


@expert_mlp.register_fake
def _(x: Tensor, up: Tensor, down: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], down.shape[1])


def traced_expert_mlp(state: Any, _: Tensor | None, x: Tensor, *more: Any) -> Tensor:
    """`state` and `more` as a backend takes them, and whether gradients are wanted."""
    up, down, form = state
    offsets_E1, token_A, scale_A, up_bias, down_bias, train = more
    args = (x, up, down, up_bias, down_bias, offsets_E1, token_A, scale_A, *form)
    return expert_mlp_trained(*args)[0] if train else expert_mlp(*args)


dispatch.register_traced("expert_mlp", traced_expert_mlp)
