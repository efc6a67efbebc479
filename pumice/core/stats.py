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

from pumice.core import dispatch
from pumice.core.errors import PumiceError
from pumice.core.registry import unknown
from pumice.core.view import WeightView

LAYER_STATS = {
    "input_sqnorm": "E[x²] of every input, [I]",
    "input_mean": "E[x] of every input, [I]",
    "input_var": "Var[x] of every input, [I]",
    "hessian": "E[x xᵀ], [I, I]: half the Hessian of the layer's mean squared output error",
    "drift": "E[(x_dense − x) xᵀ], [I, I]: how far what the layer reads now is from what it reads in the dense model",
    "input": "a sample of the layer's inputs, [S, I]",
    "output": "what the dense layer gives (without bias) for that sample, [S, O]",
}
MODEL_STATS = {
    "gradient": "gradient of the mean loss, [O, I]",
    "fisher_diag": "mean over batches of the squared gradient, [O, I] (empirical Fisher diagonal)",
    "gradients": "the gradient of every batch by itself, [O, N, I] for N batches (per sample where a batch is one)",
}
MADE_STATS = {
    "random": "uniform noise seeded by the layer's name, [O, I]",
    "bias": "what the layer adds to its outputs, [O] (zeros where it has no bias)",
}
RUN_STATS = {
    "loss": "loss of the whole model as it is, from forward passes (allocations only)",
    "states": "hidden states in front of a block and behind it (allocations only)",
}
SAMPLE_ROWS = 512

Stats = Mapping[str, Tensor]


def split_needs(needs: Iterable[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Statistics of layers and of the whole model among `needs`; PumiceError for an unknown one."""
    wanted = frozenset(needs)
    known = {**LAYER_STATS, **MODEL_STATS, **MADE_STATS, **RUN_STATS}
    for name in wanted - known.keys():
        raise PumiceError(unknown("statistic", name, known))
    return wanted & LAYER_STATS.keys(), wanted & MODEL_STATS.keys()


def add_gram(gram: Tensor, x_TI: Tensor, bf16: bool = False) -> None:
    """gram += xᵀx, upper triangle only (the other half is its mirror); `bf16` allows x to be read as bf16."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    call = dispatch.Call("gram", "dense", dtype, x_TI.device.type, x_TI.shape[0], (gram.shape[0], gram.shape[1]))
    dispatch.choose(call).prepare(gram, None)(x_TI)


@dataclass
class Accumulator:
    """Running sums over the inputs of one or several layers that read the same tensor."""

    needs: frozenset[str]
    groups: int
    width: int
    device: torch.device
    rows_per_batch: int
    bf16: bool = False
    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    samples: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = (self.groups, self.width)
        if self.needs & {"input_sqnorm", "input_var"}:
            self.sums["square"] = torch.zeros(shape, dtype=torch.float64, device=self.device)
        if self.needs & {"input_mean", "input_var"}:
            self.sums["sum"] = torch.zeros(shape, dtype=torch.float64, device=self.device)
        for need, name in (("hessian", "gram"), ("drift", "drift")):
            if need in self.needs:
                self.sums[name] = torch.zeros(*shape, self.width, device=self.device)

    def update(self, x_GTI: Tensor, dense_GTI: Tensor | None = None) -> None:
        """Add a batch; `dense_GTI` is the same rows in the dense model."""
        x = x_GTI.float()
        self.count += x.shape[1]
        if "square" in self.sums:
            # Float32 squares would leave nothing of a small variance beside a large mean.
            squares = x.double().square() if "input_var" in self.needs else x.square()
            self.sums["square"] += squares.sum(1)
        if "sum" in self.sums:
            self.sums["sum"] += x.sum(1, dtype=torch.float64)
        for group in range(self.groups if "gram" in self.sums else 0):
            add_gram(self.sums["gram"][group], x[group], self.bf16)
        if "drift" in self.sums:
            assert dense_GTI is not None
            gap = dense_GTI.float() - x
            # The gap is small beside x, so that rounding it and the sum costs little of it.
            product = (gap.bfloat16().mT @ x.bfloat16()).float() if self.bf16 else gap.mT @ x
            self.sums["drift"] += product
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
        if "drift" in self.sums:
            out["drift"] = self.sums["drift"] / self.count
        if self.samples:
            out["input"] = torch.cat(self.samples, dim=1)
        return out


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def _conv_arguments(call: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides which rows a convolution makes of its input, beside the kernel's extent."""
    keys = ("bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(keys, call, strict=False)), **named}
    neutral = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return {key: given.get(key, value) for key, value in neutral.items()}


def _conv_inputs(x: Tensor, weight: Tensor, args: dict[str, Any]) -> Tensor:
    """The rows that a convolution multiplies its kernel with, [G, T, I]."""
    if weight.dim() == 3:
        x, weight = x.unsqueeze(-2), weight.unsqueeze(-2)
        args = dict(args)
        for key, neutral in (("stride", 1), ("padding", 0), ("dilation", 1)):
            if not isinstance(args[key], str):
                args[key] = (neutral, _pair(args[key])[0])
    if x.dim() == 3:
        x = x.unsqueeze(0)
    kernel, dilation, stride = tuple(weight.shape[2:]), _pair(args["dilation"]), _pair(args["stride"])
    padding = args["padding"]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        x = F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
    columns = F.unfold(x.float(), kernel, dilation, 0 if isinstance(padding, str) else _pair(padding), stride)
    return columns.unflatten(1, (args["groups"], -1)).permute(1, 0, 3, 2).flatten(1, 2)


class EndOfPass(Exception):
    """Ends a forward pass whose rest is not needed; caught by the stream, never seen outside `core`."""


@dataclass
class _Seen:
    """A tensor that some layers of this batch read; it is held, or its id could come back as another tensor's."""

    tensor: Tensor
    accumulator: Accumulator
    readers: set[str]


class Capture(TorchFunctionMode):
    """Sees every linear map of a forward pass and feeds the inputs of the wanted weights to accumulators.

    Looking at the call (`linear`, `conv`, `addmm`, `matmul`) instead of the module finds the true input even where a
    module pads it, transposes its weight, or picks one expert out of a fused tensor. Layers that read one and the same
    tensor share an accumulator: q, k and v need one Hessian, not three. Should such layers turn out to read different
    tensors as well, `diverged` is true and the statistics have to be taken again with `share=False`.

    A pass is ended as soon as every weight has been used, unless the first pass used one of them twice.

    `dense` holds what the layers read of the next batch in the dense model, for the statistic "drift"; views whose rows
    there are others (experts that get other tokens) end up in `unpaired`.
    """

    def __init__(
        self,
        views: Sequence[WeightView],
        needs: frozenset[str],
        *,
        batches: int,
        bf16: bool = False,
        share: bool = True,
        dense: Mapping[str, list[Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.views, self.needs, self.bf16, self.share = list(views), needs, bf16, share
        self.dense = dense or {}
        self.unpaired: set[str] = set()
        self.rows_per_batch = max(1, -(-SAMPLE_ROWS // max(1, batches)))
        self.accumulators: dict[str, Accumulator] = {}
        self.token_mask: Tensor | None = None
        self._by_pointer = {self._pointer(view): view for view in self.views}
        self._batch: dict[Any, _Seen] = {}
        self._sharing: dict[int, set[frozenset[str]]] = {}
        self._calls = 0
        self._unused: set[str] = set()
        self._reused = False

    @staticmethod
    def _pointer(view: WeightView) -> int:
        return (view.tensor if view.expert is None else view.tensor[view.expert]).data_ptr()

    def next_batch(self, token_mask: Tensor | None = None) -> None:
        """Forget which tensors were seen; `token_mask` [B, L] leaves padding out of the statistics."""
        for seen in self._batch.values():
            self._sharing.setdefault(id(seen.accumulator), set()).add(frozenset(seen.readers))
        self._batch.clear()
        self.token_mask = token_mask

    def next_call(self) -> None:
        """A batch may take several calls of the module; this begins one."""
        self._calls += 1
        self._unused = {view.name for view in self.views}

    @property
    def diverged(self) -> bool:
        """Whether layers that shared an accumulator did not always read the same tensor."""
        self.next_batch()
        return any(len(groups) > 1 for groups in self._sharing.values())

    def __torch_function__(self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            self._record_attention(args, kwargs)
        elif func in _OPERANDS:
            x, weight = (args[at] if at < len(args) else kwargs.get(name) for at, name in _OPERANDS[func])
            if isinstance(weight, Tensor) and isinstance(x, Tensor) and weight.data_ptr() in self._by_pointer:
                conv = _conv_arguments(args[2:], kwargs) if func in _CONVOLUTIONS else None
                self._use(self._by_pointer[weight.data_ptr()], x, weight, conv)
        return func(*args, **kwargs)

    def _record_attention(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """`nn.MultiheadAttention` hides its output projection; with an identity in its place its input comes out."""
        view = self._by_pointer.get(args[11].data_ptr()) if len(args) > 12 else None
        if view is not None:
            eye = torch.eye(view.shape_OI[1], dtype=args[11].dtype, device=args[11].device)
            swapped = [*args]
            swapped[11:13] = [eye, None]
            x = F.multi_head_attention_forward(*swapped, **kwargs)[0]
            self._use(view, x.transpose(0, 1) if x.dim() == 3 else x, args[11], None)

    def _use(self, view: WeightView, x: Tensor, weight: Tensor, conv: dict[str, Any] | None) -> None:
        self._record(view, x, weight, conv)
        if self._calls == 1:
            self._reused |= view.name not in self._unused
        self._unused.discard(view.name)
        if self._calls > 1 and not self._reused and not self._unused:
            # Every input has been seen, so what follows (the last and often widest product) is not needed.
            raise EndOfPass

    def _record(self, view: WeightView, x: Tensor, weight: Tensor, conv: dict[str, Any] | None) -> None:
        # The version tells a tensor from the same one after a change in place; other kernels read other rows of it.
        version = 0 if x.is_inference() else x._version
        key = (id(x), version, None if conv is None else (weight.shape[2:], str(conv)))
        seen = self._batch.get(key) if self.share and not x.is_inference() else None
        known = self.accumulators.get(view.name)
        if seen is not None and (known is None or known is seen.accumulator) and view.name not in seen.readers:
            self.accumulators[view.name] = seen.accumulator
            seen.readers.add(view.name)
            return
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            rows = self._rows(x, weight, conv)
            if known is None:
                width = view.shape_OI[1]
                known = Accumulator(self.needs, rows.shape[0], width, x.device, self.rows_per_batch, self.bf16)
                self.accumulators[view.name] = known
            known.update(rows, self._twin(view, rows) if "drift" in self.needs else None)
        if seen is None:
            self._batch[key] = _Seen(x, known, {view.name})
        else:
            self._sharing.setdefault(id(known), set()).add(frozenset({view.name}))

    def _rows(self, x: Tensor, weight: Tensor, conv: dict[str, Any] | None) -> Tensor:
        """What the layer multiplies its weight with, [G, T, I]."""
        return self._without_padding(x.detach())[None] if conv is None else _conv_inputs(x.detach(), weight, conv)

    def _twin(self, view: WeightView, rows: Tensor) -> Tensor:
        """The same rows in the dense model; these very rows where an expert gets other tokens there."""
        found = self.dense.get(view.name)
        twin = found.pop(0) if found else None
        if twin is None or twin.shape != rows.shape:
            self.unpaired.add(view.name)
            return rows
        return twin

    def _without_padding(self, x: Tensor) -> Tensor:
        mask = self.token_mask
        if mask is not None and x.dim() > 2 and x.shape[:2] == mask.shape:
            return x[mask.bool()]
        x = x.reshape(-1, x.shape[-1])
        # Some layers flatten their tokens first.
        return x[mask.flatten().bool()] if mask is not None and len(x) == mask.numel() else x

    @property
    def tokens(self) -> dict[str, int]:
        """How many rows of input each view has been seen with."""
        return {name: accumulator.count for name, accumulator in self.accumulators.items()}

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
            if id(accumulator) not in done:
                done[id(accumulator)] = accumulator.finish()
            stats = done[id(accumulator)]
            for name, value in stats.items():
                if not torch.isfinite(value).all():
                    raise PumiceError(
                        f"calibration: the input of layer {view.name} holds NaN or Inf ({name}); "
                        "try --dtype float32, or look at the calibration data."
                    )
            out[view.name] = dict(stats)
            if "output" in self.needs:
                w_GOI = view.read().unflatten(0, (view.groups, -1))
                out[view.name]["output"] = stats["input"] @ w_GOI.mT
        return out


class Inputs(Capture):
    """Keeps what every view reads in a pass of the dense model, row by row, in `dtype`.

    `whole` lets the pass come to its end. Layers that read the same tensor share the rows.
    """

    def __init__(self, views: Sequence[WeightView], token_mask: Tensor | None, whole: bool, dtype: torch.dtype) -> None:
        super().__init__(views, frozenset(), batches=1)
        self.token_mask, self.whole, self.dtype = token_mask, whole, dtype
        self.seen: dict[str, list[Tensor]] = {view.name: [] for view in self.views}
        self._shared: dict[Any, tuple[Tensor, Tensor]] = {}

    @property
    def reused(self) -> bool:
        """Whether a weight was used twice in a pass; known of whole passes only."""
        return self._reused

    def next_call(self) -> None:
        super().next_call()
        # The first call of a capture is never cut short, later ones are.
        self._calls = 1 if self.whole else 2

    def _record(self, view: WeightView, x: Tensor, weight: Tensor, conv: dict[str, Any] | None) -> None:
        key = (id(x), 0 if x.is_inference() else x._version, None if conv is None else (weight.shape[2:], str(conv)))
        if key not in self._shared:
            with torch.autocast(x.device.type, enabled=False):
                # The tensor is held, or its id could come back as another one's.
                self._shared[key] = (x, self._rows(x, weight, conv).to(self.dtype, copy=True))
        self.seen[view.name].append(self._shared[key][1])


_CONVOLUTIONS = {torch.conv1d, torch.conv2d}
_OPERANDS: dict[Any, tuple[tuple[int, str], tuple[int, str]]] = {
    F.linear: ((0, "input"), (1, "weight")),
    torch.conv1d: ((0, "input"), (1, "weight")),
    torch.conv2d: ((0, "input"), (1, "weight")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    torch.matmul: ((0, "input"), (1, "other")),
    torch.mm: ((0, "input"), (1, "mat2")),
    Tensor.matmul: ((0, "input"), (1, "other")),
    Tensor.__matmul__: ((0, "input"), (1, "other")),
}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every part is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
