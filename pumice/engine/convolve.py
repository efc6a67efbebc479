"""Convolutions at inference: batch norm folded and ReLU in the same pass, each convolution dense or sparse as measured.

One run on an example shows what follows each convolution (`conv_sites.py`). Where a batch norm does, and nothing else reads what
stands between, the convolution takes the norm's scale and shift into a copy of its weight, and a ReLU behind that into its last
step; the norm and the ReLU then pass their input on. Modules, names and weights stay as they are, so that saving, training and
`unfuse_convolutions` find the ordinary model, and whoever asks for gradients gets its ordinary computation.

Legend: N images, C channels, H rows, W columns, O outputs, I inputs of an output (kernel positions included).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pumice.core import dispatch
from pumice.core.convolution import Convolution, bundled_share
from pumice.core.dispatch import Run
from pumice.engine import verdicts
from pumice.engine.conv_sites import CLAMPS, Found, Site
from pumice.engine.layer_timing import MARGIN, Timing, Verdict, time_in_turns
from pumice.weights.layouts.base import Packed, pack, pack_smallest
from pumice.weights.layouts.base import unpack as unpack_matrix
from pumice.weights.modules import SparseConv2d

COPIES = 8
"""Copies of a layer that are rotated through while it is timed: in a network the layers drive each other out of the caches."""


def _matrix(module: nn.Module) -> Packed:
    """The weight of a convolution as w_OI."""
    if isinstance(module, SparseConv2d):
        return module.packed
    return pack(cast(Tensor, module.weight).detach().flatten(1), "dense")


def _folded(site: Site, packed: Packed) -> tuple[Packed, Tensor | None]:
    """Weight and bias with the norm's scale and shift in them."""
    bias_O = cast("Tensor | None", site.module.bias)
    if site.norm is None:
        return packed, bias_O
    norm = cast(nn.BatchNorm2d, site.norm)
    mean_O, variance_O = cast(Tensor, norm.running_mean).float(), cast(Tensor, norm.running_var).float()
    scale_O = torch.rsqrt(variance_O + norm.eps)
    if norm.affine:
        scale_O = scale_O * norm.weight.detach().float()
    shift_O = (-mean_O if bias_O is None else bias_O.detach().float() - mean_O) * scale_O
    if norm.affine:
        shift_O = shift_O + norm.bias.detach().float()
    w_OI = (unpack_matrix(packed).float() * scale_O[:, None]).to(packed.dtype)
    return pack(w_OI, "dense" if packed.layout == "dense" else "csr"), shift_O


class OwnForward:
    """What stands in front of a module's forward until `unfuse_convolutions` takes it away."""


class FusedConvolution(OwnForward):
    """The forward of a convolution with the norm and the activation behind it."""

    def __init__(self, site: Site, backend: str) -> None:
        self.site, self.backend = site, backend
        self.bound: tuple[Any, Run | None] | None = None
        self.held: list[Tensor] = []
        self.how: Convolution | None = None
        functools.update_wrapper(self, type(site.module).forward, updated=())

    def __getstate__(self) -> dict[str, Any]:
        # A copy binds its own weights when it is first called.
        return {"site": self.site, "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        FusedConvolution.__init__(self, state["site"], state["backend"])

    def __call__(self, input: Tensor) -> Tensor:
        site = self.site
        norm = site.norm
        plain = is_plain(input) and input.dim() == 4 and input.dtype is self.dtype
        if plain and not (norm is not None and norm.training):
            run = self.ready()
            if run is not None:
                return run(input, self.how)
        y = type(site.module).forward(site.module, input)
        for module in (site.norm, site.activation):
            y = y if module is None else type(module).forward(module, y)
        return y

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.site.module._parameters.values() if p is not None)

    def ready(self) -> Run | None:
        """The backend bound to the weights as they are now; None where it does not run their type."""
        state = self._state()
        if self.bound is None or self.bound[0] != state:
            # Held, since other numbers could come to stand at an address that is given back.
            self.held = [t.detach() for t in self._tensors() if t is not None]
            self.how = how(self.site)
            self.bound = state, self._prepare()
        return self.bound[1]

    def _tensors(self) -> list[Tensor | None]:
        site = self.site
        held = [*site.module._parameters.values(), *site.module._buffers.values()]
        return held if site.norm is None else [*held, *site.norm._parameters.values(), *site.norm._buffers.values()]

    def _state(self) -> Any:
        return [None if t is None else (t.data_ptr(), 0 if t.is_inference() else t._version) for t in self._tensors()]

    def _prepare(self) -> Run | None:
        packed = _matrix(self.site.module)
        if dispatch.get("conv2d", packed.layout, self.backend).refuse(call_of(self.site, packed)):
            return None
        return bind(self.site, packed, self.backend)


def is_plain(x: Any) -> bool:
    """Whether a call is one at inference on the CPU, with an ordinary tensor: what ways of our own are for."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or type(x) is not Tensor
        or not x.is_cpu
        or torch.is_autocast_enabled("cpu")
    )


class Moved:
    """The forward of a convolution that another module stands for, where somebody still holds it."""

    def __init__(self, module: nn.Module, new: nn.Module) -> None:
        self.new = new
        functools.update_wrapper(self, type(module).forward, updated=())

    def __call__(self, input: Tensor) -> Tensor:
        return self.new(input)


class Passed(OwnForward):
    """The forward of a module whose work the convolution before it has done."""

    def __init__(self, module: nn.Module) -> None:
        functools.update_wrapper(self, type(module).forward, updated=())

    def __call__(self, input: Tensor) -> Tensor:
        return input


class InPlace(OwnForward):
    """The forward of an activation whose input nobody reads afterwards: at inference it overwrites it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.clamp = module, CLAMPS[type(module)]
        functools.update_wrapper(self, type(module).forward, updated=())

    def __call__(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(input) is not Tensor:
            return type(self.module).forward(self.module, input)
        return input.relu_() if self.clamp[1] == math.inf else input.clamp_(*self.clamp)


class PooledInLast(OwnForward):
    """The forward of a max pooling that goes through channels last, where PyTorch's is vectorised; y is channels first again."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        functools.update_wrapper(self, type(module).forward, updated=())

    def __call__(self, input: Tensor) -> Tensor:
        plain = not torch.is_grad_enabled() and type(input) is Tensor and input.dim() == 4 and input.is_cpu
        if plain and not torch.compiler.is_compiling():
            input = input.contiguous(memory_format=torch.channels_last)
        return type(self.module).forward(self.module, input).contiguous()


def how(site: Site) -> Convolution:
    """What the op `conv2d` takes beside the weight."""
    m = cast(Any, site.module)
    return Convolution.of(m.kernel_size, m.stride, m.padding, m.dilation, m.groups, site.clamp)


def call_of(site: Site, packed: Packed) -> dispatch.Call:
    """The question which backends can run it."""
    return dispatch.Call("conv2d", packed.layout, packed.dtype, str(packed.device), 1, packed.shape, how(site).params)


def bind(site: Site, packed: Packed, backend: str) -> Run:
    """`run(x_NCHW, how, add_NOHW)` of the convolution with the norm behind it."""
    folded, bias_O = _folded(site, packed)
    return dispatch.get("conv2d", folded.layout, backend).prepare(folded, bias_O)


def _candidates(site: Site) -> list[Packed]:
    """The weight dense, and in its smallest layout if it has zeros that one leaves out."""
    dense = _matrix(site.module)
    if dense.layout != "dense":
        dense = pack(unpack_matrix(dense), "dense")
    sparse = pack_smallest(dense.tensors["weight"])
    return [dense] if sparse.layout == "dense" else [dense, sparse]


def _measure(site: Site, candidates: Sequence[Packed]) -> Verdict:
    """Time every way to run a convolution, in turns, at the size of x that it was seen with."""
    images = site.shape[0]
    x_NCHW = torch.randn(site.shape).to(candidates[0].dtype)
    runs: list[tuple[Timing, Callable[[], None]]] = []
    timings: list[Timing] = []
    for packed in candidates:
        for backend, reason in dispatch.candidates(call_of(site, packed)):
            timing = Timing(packed.layout, backend.name, images, None, reason, dict(packed.params))
            timings.append(timing)
            if reason is None:
                bound = [bind(site, packed, backend.name) for _ in range(COPIES)]
                runs.append((timing, _turns([functools.partial(run, how=how(site)) for run in bound], x_NCHW)))
    time_in_turns(runs)
    best = {
        layout: min((t for t in timings if t.layout == layout and t.ms is not None), key=_ms, default=None)
        for layout in {packed.layout for packed in candidates}
    }
    dense = best.pop("dense")
    assert dense is not None
    sparse = next(iter(best.values()), None)
    if sparse is None:
        chosen, reason = dense, "dense: the weight has no zeros that a sparse kernel could leave out"
    else:
        ratio = _ms(dense) / _ms(sparse)
        chosen = sparse if ratio >= MARGIN else dense
        said = f"is {ratio:.2f}x as fast as the best dense" if chosen is sparse else f"has {ratio:.2f} of dense's speed"
        reason = f"{sparse.layout} {said} on {'x'.join(map(str, site.shape))}"
    return Verdict(chosen.layout, chosen.params, {images: chosen.backend}, timings, {images: dense}, reason)


def _ms(timing: Timing) -> float:
    assert timing.ms is not None
    return timing.ms


def _turns(runs: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Callable[[], None]:
    for once in runs:
        # Some order their weights when they first see the size of x.
        once(x)
    state = {"next": 0}

    def run() -> None:
        state["next"] = (state["next"] + 1) % len(runs)
        runs[state["next"]](x)

    return run


@dataclass
class Packing:
    """What was chosen for a convolution: the module that runs it, and the bytes that it keeps beside its weight."""

    module: nn.Module
    packed: Packed
    verdict: Verdict
    extra: int


def pack_site(site: Site, remeasure: bool = False) -> Packing:
    """The convolution as it runs fastest here, measured, or recalled from an earlier measurement in the same circumstances."""
    candidates = _candidates(site)
    density = round(float((candidates[0].tensors["weight"] != 0).float().mean()) * 40)
    # Zeros in groups of outputs run otherwise than as many at random.
    bundled = round(bundled_share(candidates[0].tensors["weight"]) * 40)
    key = ("conv2d", site.shape, how(site), candidates[0].dtype, [c.layout for c in candidates], density, bundled)
    verdict = None if remeasure else verdicts.recall(key)
    if verdict is None:
        verdict = _measure(site, candidates)
        verdicts.remember(key, verdict)
    packed = next(c for c in candidates if c.layout == verdict.layout)
    backend = verdict.backends[site.shape[0]]
    module = _module_for(site.module, packed)
    fused = FusedConvolution(dataclasses.replace(site, module=module), backend)
    module.__dict__["forward"] = fused
    if module is not site.module:
        site.module.__dict__["forward"] = Moved(site.module, module)
    for passed in (site.norm, site.activation):
        if passed is not None:
            passed.__dict__["forward"] = Passed(passed)
    extra = dispatch.get("conv2d", packed.layout, backend).extra(packed)
    # PyTorch's own convolution runs from the folded copy itself.
    folded = packed.nbytes if backend == "torch" and site.norm is not None else 0
    return Packing(module, packed, verdict, extra + folded)


def pack_others(found: Found, dtype: torch.dtype) -> None:
    """Activations overwrite their inputs, and max poolings go the faster of two ways, which is measured."""
    for activation in found.activations:
        activation.__dict__["forward"] = InPlace(activation)
    for pool, shape in found.pools:
        x = torch.randn(shape).to(dtype)
        ways = {"torch": functools.partial(type(pool).forward, pool), "last": PooledInLast(pool)}
        timings = [(Timing("dense", name, shape[0]), _turns([run], x)) for name, run in ways.items()]
        time_in_turns(timings)
        if _ms(timings[1][0]) * MARGIN < _ms(timings[0][0]):
            pool.__dict__["forward"] = ways["last"]


def _module_for(module: nn.Module, packed: Packed) -> nn.Module:
    if packed.layout == "dense":
        return module.to_dense() if isinstance(module, SparseConv2d) else module
    if isinstance(module, SparseConv2d):
        return module if module.layout == packed.layout else SparseConv2d.from_module(module.to_dense(), packed)
    return SparseConv2d.from_module(module, packed)


def unfuse_convolutions(model: nn.Module) -> nn.Module:
    """Take the fused forwards of convolutions, norms and activations back, in place; returns the model."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), OwnForward):
            del module.__dict__["forward"]
    return model
