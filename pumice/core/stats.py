"""Calibration statistics: methods declare what they need, this engine collects it.

Shapes: T tokens (rows of a layer's input, or output pixels of a convolution), I inputs per group, O outputs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pumice.core.errors import PumiceError
from pumice.core.registry import unknown
from pumice.core.view import WeightView

LAYER_STATS = {
    "input_sqnorm": "E[x²] of every input, [I]",
    "input_mean": "E[x] of every input, [I]",
    "input_var": "Var[x] of every input, [I]",
    "hessian": "E[x xᵀ], [I, I]: half the Hessian of the layer's mean squared output error",
    "input": "a sample of the layer's inputs, [S, I]",
    "output": "what the dense layer gives (without bias) for that sample, [S, O]",
}
MODEL_STATS = {
    "gradient": "gradient of the mean loss, [O, I]",
    "fisher_diag": "mean over batches of the squared gradient, [O, I] (empirical Fisher diagonal)",
}
MADE_STATS = {"random": "uniform noise seeded by the layer's name, [O, I]"}
SAMPLE_ROWS = 512

Stats = Mapping[str, Tensor]


def split_needs(needs: Iterable[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Statistics of layers and of the whole model among `needs`; PumiceError for an unknown one."""
    wanted = frozenset(needs)
    for name in wanted - LAYER_STATS.keys() - MODEL_STATS.keys() - MADE_STATS.keys():
        raise PumiceError(unknown("statistic", name, [*LAYER_STATS, *MODEL_STATS, *MADE_STATS]))
    return wanted & LAYER_STATS.keys(), wanted & MODEL_STATS.keys()


@contextmanager
def bf16_matmul(enabled: bool = True) -> Iterator[None]:
    """Float32 matmuls read their inputs as bf16 and accumulate in float32 (CPU), where torch offers it."""
    backend = getattr(torch.backends.mkldnn, "matmul", None)
    if not enabled or backend is None or not hasattr(backend, "fp32_precision"):
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def add_gram(gram: Tensor, x_TI: Tensor) -> None:
    """gram += xᵀx. Wide matrices are done in panels of the upper triangle only, since the other half is its mirror."""
    width = gram.shape[0]
    panel = max(384, -(-width // 4))
    for start in range(0, width, panel):
        stop = min(start + panel, width)
        gram[start:stop, start:].addmm_(x_TI[:, start:stop].t(), x_TI[:, start:])


@dataclass
class Accumulator:
    """Running sums over the inputs of one or several layers that read the same tensor."""

    needs: frozenset[str]
    groups: int
    width: int
    device: torch.device
    rows_per_batch: int
    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    samples: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = (self.groups, self.width)
        if self.needs & {"input_sqnorm", "input_var"}:
            self.sums["square"] = torch.zeros(shape, dtype=torch.float64, device=self.device)
        if self.needs & {"input_mean", "input_var"}:
            self.sums["sum"] = torch.zeros(shape, dtype=torch.float64, device=self.device)
        if "hessian" in self.needs:
            self.sums["gram"] = torch.zeros(*shape, self.width, device=self.device)

    def update(self, x_GTI: Tensor) -> None:
        x = x_GTI.float()
        self.count += x.shape[1]
        if "square" in self.sums:
            self.sums["square"] += x.square().sum(1)
        if "sum" in self.sums:
            self.sums["sum"] += x.sum(1)
        for group in range(self.groups if "gram" in self.sums else 0):
            add_gram(self.sums["gram"][group], x[group])
        if self.needs & {"input", "output"} and x.shape[1]:
            step = max(1, x.shape[1] // self.rows_per_batch)
            self.samples.append(x[:, ::step][:, : self.rows_per_batch].clone())

    def finish(self) -> dict[str, Tensor]:
        """Every declared statistic with a leading axis G."""
        out: dict[str, Tensor] = {}
        if self.count == 0:
            return out
        if "square" in self.sums:
            out["input_sqnorm"] = (self.sums["square"] / self.count).float()
        if "sum" in self.sums:
            mean = self.sums["sum"] / self.count
            out["input_mean"] = mean.float()
            if "input_var" in self.needs:
                out["input_var"] = (self.sums["square"] / self.count - mean.square()).clamp(min=0).float()
        if "gram" in self.sums:
            gram = self.sums["gram"] / self.count
            out["hessian"] = torch.triu(gram) + torch.triu(gram, 1).mT
        if self.samples:
            out["input"] = torch.cat(self.samples, dim=1)
        return out


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _conv_inputs(x: Tensor, weight: Tensor, call: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    """The rows that a convolution multiplies its kernel with, [G, T, I]."""
    keys = ("bias", "stride", "padding", "dilation", "groups")
    args = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **dict(zip(keys, call, strict=False)), **named}
    if weight.dim() == 3:
        x, weight = x.unsqueeze(-2), weight.unsqueeze(-2)
        for key, neutral in (("stride", 1), ("padding", 0), ("dilation", 1)):
            if not isinstance(args[key], str):
                args[key] = (neutral, *_pair(args[key])[:1])
    if x.dim() == 3:
        x = x.unsqueeze(0)
    kernel, dilation = tuple(weight.shape[2:]), _pair(args["dilation"])
    padding = args["padding"]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        x = F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
    columns = F.unfold(
        x.float(), kernel, dilation, 0 if isinstance(padding, str) else _pair(padding), _pair(args["stride"])
    )
    return columns.unflatten(1, (args["groups"], -1)).permute(1, 0, 3, 2).flatten(1, 2)


class EndOfPass(Exception):
    """Ends a forward pass whose rest is not needed; caught by the stream, never seen outside `core`."""


class Capture(TorchFunctionMode):
    """Sees every linear map of a forward pass and feeds the inputs of the wanted weights to accumulators.

    Looking at the call (`linear`, `conv`, `addmm`, `matmul`) instead of the module finds the true input even where a
    module pads it, transposes its weight, or picks one expert out of a fused tensor. Layers that read one and the same
    tensor share an accumulator: q, k and v need one Hessian, not three.
    """

    def __init__(self, views: Sequence[WeightView], needs: frozenset[str], *, batches: int, bf16: bool = False) -> None:
        super().__init__()
        self.views, self.needs, self.bf16 = list(views), needs, bf16
        self.rows_per_batch = max(1, -(-SAMPLE_ROWS // max(1, batches)))
        self.accumulators: dict[str, Accumulator] = {}
        self.token_mask: Tensor | None = None
        self.may_end = False
        self._missing: set[str] = set()
        self._by_pointer = {self._pointer(view): view for view in self.views}
        self._batch: dict[int, tuple[Tensor, Accumulator]] = {}

    @staticmethod
    def _pointer(view: WeightView) -> int:
        return (view.tensor if view.expert is None else view.tensor[view.expert]).data_ptr()

    def next_batch(self, token_mask: Tensor | None = None) -> None:
        """Forget which tensors were seen; `token_mask` [B, L] leaves padding out of the statistics."""
        self._batch.clear()
        self._missing = {view.name for view in self.views}
        self.token_mask = token_mask

    def __torch_function__(self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        where = _OPERANDS.get(func)
        if where is not None and len(args) > max(where) and isinstance(args[where[1]], Tensor):
            view = self._by_pointer.get(args[where[1]].data_ptr())
            if view is not None:
                self._record(view, func, args[where[0]], args, kwargs)
                self._missing.discard(view.name)
                if self.may_end and not self._missing:
                    # Every input has been seen, so what follows (the last and often widest product) is not needed.
                    raise EndOfPass
        return func(*args, **kwargs)

    def _record(self, view: WeightView, func: Callable, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        seen = self._batch.get(id(x))
        known = self.accumulators.get(view.name)
        if seen is not None and (known is None or known is seen[1]):
            self.accumulators[view.name] = seen[1]
            return
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), bf16_matmul(self.bf16):
            if func in _CONVOLUTIONS:
                rows = _conv_inputs(x.detach(), args[1], args[2:], kwargs)
            else:
                rows = self._without_padding(x.detach())[None]
            if known is None:
                width = view.shape_OI[1]
                known = Accumulator(self.needs, rows.shape[0], width, x.device, self.rows_per_batch)
                self.accumulators[view.name] = known
            known.update(rows)
        # The tensor is held until the next batch, or its id could come back as another tensor's.
        self._batch[id(x)] = (x, known)

    def _without_padding(self, x: Tensor) -> Tensor:
        mask = self.token_mask
        if mask is not None and x.dim() > 2 and x.shape[:2] == mask.shape:
            return x[mask.bool()]
        return x.reshape(-1, x.shape[-1])

    def finish(self) -> dict[str, dict[str, Tensor]]:
        """Statistics by view name, each with a leading axis G; views that no token reached are absent.

        Raises:
            PumiceError: an activation is NaN or Inf (names the layer).
        """
        done: dict[int, dict[str, Tensor]] = {}
        out: dict[str, dict[str, Tensor]] = {}
        for view in self.views:
            accumulator = self.accumulators.get(view.name)
            if accumulator is None or accumulator.count == 0:
                continue
            stats = done.setdefault(id(accumulator), accumulator.finish())
            for name, value in stats.items():
                if not torch.isfinite(value).all():
                    raise PumiceError(
                        f"calibration: the input of layer {view.name} holds NaN or Inf ({name}); "
                        "try --dtype float32, or look at the calibration data."
                    )
            out[view.name] = dict(stats)
        return out


_CONVOLUTIONS = {torch.conv1d, torch.conv2d}
_OPERANDS: dict[Any, tuple[int, int]] = {
    F.linear: (0, 1),
    torch.conv1d: (0, 1),
    torch.conv2d: (0, 1),
    torch.addmm: (1, 2),
    torch.matmul: (0, 1),
    torch.mm: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
}


def loss_of(model: nn.Module, batch: Mapping[str, Any], loss: Callable[[nn.Module, Any], Tensor] | None) -> Tensor:
    """The scalar loss of one batch: `loss(model, batch)` if given, else what the model returns for its labels."""
    if loss is not None:
        return loss(model, batch)
    inputs = dict(batch)
    if "labels" not in inputs and "input_ids" in inputs:
        inputs["labels"] = inputs["input_ids"]
    out = model(**inputs)
    value = getattr(out, "loss", None)
    if value is None:
        raise PumiceError("gradient statistics need a loss: pass loss=f(model, batch), or data whose batches hold labels.")
    return value


def model_stats(
    model: nn.Module,
    views: Sequence[WeightView],
    batches: Iterable[Any],
    needs: frozenset[str],
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Gradient statistics of every view over the whole model, by view name.

    Takes the memory of the model, its gradients and one more copy of the weights per statistic.

    Raises:
        PumiceError: no loss can be had, or it is not finite.
    """
    # Another view of the same fused tensor needs the same gradient, so sums are kept per parameter.
    parameters = {id(view.tensor): view.tensor for view in views}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in parameters)
    sums = {name: {key: torch.zeros_like(p, dtype=torch.float32) for key, p in parameters.items()} for name in needs}
    count = 0
    try:
        with torch.enable_grad():
            for batch in batches:
                value = loss_of(model, batch, loss)
                if not torch.isfinite(value):
                    raise PumiceError(f"calibration: the loss is {value.item()}; look at the calibration data and the weights.")
                value.backward()
                count += 1
                for key, parameter in parameters.items():
                    if parameter.grad is None:
                        continue
                    gradient = parameter.grad.float()
                    if "gradient" in sums:
                        sums["gradient"][key] += gradient
                    if "fisher_diag" in sums:
                        sums["fisher_diag"][key] += gradient.square()
                    parameter.grad = None
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None
    return {
        view.name: {name: view.as_matrix(sums[name][id(view.tensor)] / max(count, 1)) for name in needs} for view in views
    }
