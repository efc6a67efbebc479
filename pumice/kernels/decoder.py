"""One token through a whole decoder in one call of C++: the op "decoder".

Between its matrices, a layer of a small model spends most of its time on calls: norms, rotary positions, the cache, attention
over one query. Here they are a few loops in C++ around the kernels that stream stored matrices, so that a token costs little
more than reading the weights. x stays in fp32 from the first layer to the last.

Legend: B sequences, D model width, d width of a head, L layers. `prepare(decoder, None)` returns
`run(x_BD, cos_Bd, sin_Bd, caches_L2, strides, length, mask_BT) -> y_BD`, where `caches_L2` has the addresses of each layer's
keys and values [B, heads, room, d], `strides` how far apart sequences and heads are in them (in numbers), and `length` counts
the tokens with this one, whose keys and values are written in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.core.decoder import PARTS, Decoder
from pumice.core.dispatch import Backend, Call, Run, register
from pumice.core.errors import PumiceError
from pumice.kernels import cpu_backend
from pumice.kernels.cpu_backend import CODED, CODES, DECODE_GROUPS, PRODUCTS, RUN_AS, Plan
from pumice.kernels.csr_cpu import IN_TILES, TilePlan
from pumice.kernels.lanes_cpu import LAYOUTS, LanePlan
from pumice.kernels.planned import Planned

# Threads wait for each other at every step, so all pieces have to run at once, as a loop of OpenMP runs them; tasks in a queue
# may not.
TOGETHER = not cpu_backend.torch_threads or "OpenMP" in torch.__config__.parallel_info()
MOST_ROWS = 16
MOST_HEAD = 256
MATRICES = ("dense", "bitmask", "block", *CODED, *RUN_AS)


def plan_of(packed: Any, bias: Tensor | None) -> Planned:
    """A stored matrix as the kernels for few rows take it.

    Raises:
        PumiceError: no such kernel for this layout, or for groups of this size.
    """
    if packed.layout in IN_TILES:
        return TilePlan(packed, bias)
    if packed.layout in LAYOUTS:
        return LanePlan(packed, bias)
    group = packed.params.get("group", DECODE_GROUPS[0])
    if packed.layout not in MATRICES or group not in DECODE_GROUPS:
        groups = f" in groups of {group}" if "group" in packed.params else ""
        raise PumiceError(
            f"layout={packed.layout!r}{groups} has no C++ kernel for few rows: pack the layer as one of "
            f"{', '.join((*MATRICES, *IN_TILES, *LAYOUTS))} (groups of {' or '.join(map(str, DECODE_GROUPS))})."
        )
    return Plan(packed, bias)


def _refuse(call: Call) -> str | None:
    if call.device != "cpu" or call.dtype not in PRODUCTS:
        return f"computes in bfloat16 or float32 on cpu, not in {call.dtype} on {call.device}"
    if call.rows > MOST_ROWS:
        return f"rows {call.rows} > {MOST_ROWS}"
    head = call.params["head"]
    if head > MOST_HEAD or head % 2:
        return f"heads of {head} numbers (even, and at most {MOST_HEAD})"
    return cpu_backend.missing()


class _Bound:
    """The plan of a decoder, and everything that it points into."""

    def __init__(self, decoder: Decoder) -> None:
        native: Any = cpu_backend.native
        self.plans = [plan_of(*layer.parts[part]) for layer in decoder.layers for part in PARTS]
        self.norms: list[Tensor] = []
        addresses = [
            address
            for layer in decoder.layers
            for address in map(self._norm, (layer.input_norm, layer.mlp_norm, layer.query_norm, layer.key_norm))
        ]
        where = torch.tensor([*addresses, self._norm(decoder.norm)], dtype=torch.int64)
        numbers = torch.tensor([decoder.eps, decoder.scale], dtype=torch.float64)
        sizes = decoder.width, decoder.inner, decoder.heads, decoder.kv_heads, decoder.head, CODES[decoder.dtype]
        handles = [plan.handle for plan in self.plans]
        try:
            self.handle = native.plan_decoder(
                handles, where.data_ptr(), numbers.data_ptr(), len(decoder.layers), *sizes
            )
        except ValueError as error:
            raise PumiceError(f"this decoder cannot run in one call: {error}.") from None

    def _norm(self, weight: Tensor | None) -> int:
        if weight is None:
            return 0
        self.norms.append(weight.detach().to(torch.float32).contiguous().clone())
        return self.norms[-1].data_ptr()


def _prepare(decoder: Any, _: Tensor | None) -> Run:
    bound, decode = _Bound(decoder), cpu_backend.native.decode
    threads = torch.get_num_threads if TOGETHER else lambda: 1

    def run(
        x_BD: Tensor,
        cos_Bd: Tensor,
        sin_Bd: Tensor,
        caches_L2: Tensor,
        strides: tuple[int, int],
        length: int,
        mask_BT: Tensor | None,
    ) -> Tensor:
        y_BD = torch.empty_like(x_BD)
        mask = 0 if mask_BT is None else mask_BT.data_ptr()
        pointers = cos_Bd.data_ptr(), sin_Bd.data_ptr(), caches_L2.data_ptr()
        decode(
            bound.handle,
            x_BD.data_ptr(),
            x_BD.shape[0],
            *pointers,
            *strides,
            length,
            mask,
            y_BD.data_ptr(),
            threads(),
        )
        return y_BD

    return run


register(Backend("native", "decoder", "dense", _refuse, _prepare, 20, "C++: one token through all layers"))
