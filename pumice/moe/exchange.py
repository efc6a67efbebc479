"""Collectives of one MoE layer, with gradients, and with an error instead of a hang when a process is lost.

Legend: R rows, W processes of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pumice.core.errors import PumiceError


class Exchange:
    """Sends rows between the processes of a group, on behalf of the layer `name`, number `place` of its model.

    Every process has to make the same calls in the same order, in the forward and in the backward pass.
    """

    def __init__(self, group: dist.ProcessGroup, name: str, place: int, mesh: DeviceMesh | None = None) -> None:
        self.group, self.name, self.place, self._mesh = group, name, place, mesh
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        # A group cannot be copied.
        return Exchange(self.group, self.name, self.place, self._mesh)

    def mesh(self, device: str) -> DeviceMesh:
        """The group as a mesh of one axis."""
        if self._mesh is None:
            self._mesh = DeviceMesh.from_group(self.group, device)
        return self._mesh

    def rows(self, x_R: Tensor, send: list[int], receive: list[int], what: str) -> Tensor:
        """The first `send[0]` rows of x to process 0, and so on; `receive[w]` rows come back from process w.

        Differentiable: gradients go the way back.

        Raises:
            PumiceError: another process has ended, hangs, or is elsewhere.
        """
        return _Rows.apply(x_R, self, send, receive, what)  # pyright: ignore[reportReturnType]

    def total(self, x: Tensor, what: str) -> Tensor:
        """The sum over all processes, the same on each; differentiable with respect to the sum of all their losses.

        Raises:
            PumiceError: as in `rows`.
        """
        return _Total.apply(x, self, what)  # pyright: ignore[reportReturnType]

    def meet(self, call: tuple[int, ...], counts_WN: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Row w of the counts to process w: what this one sends, and what it will receive, [W][N] each.

        `call` says in numbers which call this is: it must be the same everywhere, or nothing that follows fits.

        Raises:
            PumiceError: the processes are in different layers, or some want gradients and some do not.
        """
        head_WC = torch.tensor([[self.place, *call]] * self.world, device=counts_WN.device)
        sent_WM = torch.cat([head_WC, counts_WN], dim=1)
        ones = [1] * self.world
        got_WM = self.rows(sent_WM, ones, ones, "the counts of tokens")
        sent, got = torch.stack([sent_WM, got_WM]).tolist()
        size = head_WC.shape[1]
        heads = [tuple(row[:size]) for row in got]
        if len(set(heads)) > 1:
            seen = ", ".join(f"rank {rank} {head}" for rank, head in enumerate(heads))
            raise PumiceError(
                f"MoE layer {self.name!r} on rank {self.rank} met other calls (layer number, gradients, dtype, sizes): "
                f"{seen}. All processes have to call the same layers in the same order, in the same mode."
            )
        return [row[size:] for row in sent], [row[size:] for row in got]

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turns what the backend says of a lost process into one sentence with the layer and the remedy."""
        try:
            yield
        except RuntimeError as error:
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PumiceError(
                f"MoE layer {self.name!r} on rank {self.rank} waited for {what} from the other {self.world - 1} "
                f"processes and lost one of them ({cause}). A process has ended, hangs, or has left this layer out: "
                "look at the first error of the others. Start them with torchrun, which ends all when one fails; "
                "init_process_group(timeout=…) sets how long to wait for one that hangs."
            ) from error


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_R: Tensor, exchange: Exchange, send: list[int], receive: list[int], what: str) -> Tensor:
        ctx.exchange, ctx.send, ctx.receive, ctx.what = exchange, send, receive, what
        return _send(x_R, exchange, send, receive, what)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_R: Tensor) -> tuple[Tensor | None, ...]:
        back_R = _send(gradient_R, ctx.exchange, ctx.receive, ctx.send, f"the gradients of {ctx.what}")
        return back_R, None, None, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange, what: str) -> Tensor:
        ctx.exchange, ctx.what = exchange, what
        return _sum(x, exchange, what)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(gradient, ctx.exchange, f"the gradients of {ctx.what}"), None, None


def _send(x_R: Tensor, exchange: Exchange, send: list[int], receive: list[int], what: str) -> Tensor:
    got_R = x_R.new_empty(sum(receive), *x_R.shape[1:])
    with exchange.explained(what):
        dist.all_to_all_single(got_R, x_R.contiguous(), receive, send, group=exchange.group)
    return got_R


def _sum(x: Tensor, exchange: Exchange, what: str) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    with exchange.explained(what):
        dist.all_reduce(total, group=exchange.group)
    return total
