"""What a language model's loss would be with one block replaced, computed from that block on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.calls import call_model, hidden_of, like, record_of
from pumice.core.errors import PumiceError
from pumice.core.gradients import loss_of
from pumice.core.precision import products
from pumice.core.stats import evaluating
from pumice.prune.shrink.blocks import rows, watching


class PassOn(nn.Module):
    """Returns the hidden state that it gets, or the one it was given, wrapped as the blocks wrap theirs."""

    def __init__(self, wrapping: Any, hidden: Tensor | None = None) -> None:
        super().__init__()
        self.wrapping, self.hidden = wrapping, hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return like(self.wrapping, record_of(args, kwargs).hidden() if self.hidden is None else self.hidden)


class _Enter(nn.Module):
    """Calls a block on a remembered hidden state instead of the one it gets."""

    def __init__(self, block: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.block, self.hidden = block, hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return record_of(args, kwargs).call(self.block, self.hidden.clone())


class Trials:
    """Losses of a model with one of its blocks replaced.

    What every block of the present model reads is kept (len(layers) x tokens x width values), so that a trial at block i
    costs the blocks from i on. After a change of the model, call `refresh`.

    Raises:
        PumiceError: the batches give no loss.
    """

    def __init__(
        self, model: nn.Module, layers: nn.ModuleList, batches: Sequence[Any], compute: torch.dtype = torch.float32
    ) -> None:
        self.model, self.layers, self.compute = model, layers, compute
        no_cache = {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", None) else {}
        self.batches = [{**batch, **no_cache} if isinstance(batch, Mapping) else batch for batch in batches]
        if not self.batches:
            raise PumiceError("data=None: trials measure the loss on calibration data; pass data=….")
        self.device = next(model.parameters()).device.type
        self.wrapping: Any = None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the hidden states of the model as it is now."""
        self.inputs: list[list[Tensor]] = []

        def see(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.inputs[-1].append(record_of(args, kwargs).hidden())
            self.wrapping = like(output, hidden_of(output)[..., :0])

        with evaluating(self.model), watching(list(self.layers), see):
            for batch in self.batches:
                self.inputs.append([])
                with products(self.device, self.compute):
                    call_model(self.model, batch)

    @torch.no_grad()
    def loss(self, at: int | None = None, block: nn.Module | None = None) -> float:
        """Mean loss with `block` (None: nothing) in place of block `at`; without `at`, of the model as it is."""
        total, count = 0.0, 0
        for batch, inputs in zip(self.batches, self.inputs, strict=True):
            swapped: dict[int, nn.Module] = {}
            if at is not None:
                swapped = {i: PassOn(self.wrapping) for i in range(at)}
                swapped[at] = PassOn(self.wrapping, inputs[at]) if block is None else _Enter(block, inputs[at])
            total += self._loss_with(swapped, batch) * rows(batch)
            count += rows(batch)
        return total / count

    def _loss_with(self, swapped: Mapping[int, nn.Module], batch: Any) -> float:
        before = {index: self.layers[index] for index in swapped}
        try:
            for index, module in swapped.items():
                self.layers[index] = module
            with evaluating(self.model), products(self.device, self.compute):
                return float(loss_of(self.model, batch, None))
        finally:
            for index, module in before.items():
                self.layers[index] = module
