"""Choose by measuring how each layer runs here: dense against every layout that fits it, weights cold."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from pumice.core import dispatch, registry
from pumice.core.dispatch import Call
from pumice.core.errors import PumiceError
from pumice.core.progress import bar
from pumice.core.view import WeightView, module_views
from pumice.engine import verdicts
from pumice.engine.conv_blocks import fuse_blocks
from pumice.engine.conv_sites import Site, look
from pumice.engine.convolve import Packing, pack_others, pack_site, unfuse_convolutions
from pumice.engine.fuse import fuse, unfuse
from pumice.engine.layer_timing import Timing, Verdict
from pumice.engine.pages import gather_weights, give_back
from pumice.engine.verdicts import Asked
from pumice.weights.grid import Coding, kept
from pumice.weights.layouts.base import LayoutRefused, Packed, pack_smallest, repack
from pumice.weights.layouts.base import pack as pack_as
from pumice.weights.layouts.base import unpack as unpack_matrix
from pumice.weights.modules import (
    SparseConv2d,
    SparseLinear,
    SparseModule,
    densify,
    reads_weight,
    replace_module,
    sparse_twin,
)

FLOATS = ("bfloat16", "float16", "float32")
COLD_BYTES = 128 << 20
"""Copies of a layer are rotated through this much memory, if the model's own layers are as large together."""


@dataclass
class LayerChoice:
    """What runs for one layer and why."""

    name: str
    shape: tuple[int, int]
    density: float
    layout: str
    params: dict[str, int]
    backends: dict[int, str]
    """Rows -> backend."""
    ms: dict[int, float]
    dense_ms: dict[int, float]
    """Rows -> milliseconds of the best dense backend in the same run."""
    bytes: int
    """In memory: what is stored, and what its backends keep beside it."""
    dense_bytes: int
    reason: str
    timings: list[Timing] = field(default_factory=list)


@dataclass
class Description:
    """How a model is stored and run, layer by layer."""

    layers: list[LayerChoice]
    batch: tuple[int, ...] = ()
    threads: int = 0

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def copies(self) -> int:
        """Bytes that backends keep beside the weights themselves (oneDNN's reordered dense ones)."""
        return sum(layer.bytes - layer.dense_bytes for layer in self.layers if layer.layout == "dense")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes, "dense_bytes": self.dense_bytes}


def pack(
    model: nn.Module,
    *,
    batch: int | Sequence[int] = (1,),
    values: str | Mapping[str, Any] | None = None,
    activations: str | None = None,
    example: Any = None,
    remeasure: bool = False,
    progress: bool = True,
) -> nn.Module:
    """Swap each linear layer for the fastest way to run it here, in place; returns the model.

    Every layout that fits a layer's zeros is timed against the best dense backend on this machine, with the caller's
    thread count and weights out of cache, at the given batch sizes (rows: sequences × tokens of one forward pass).
    The layout with the best geometric mean wins, dense unless it is beaten by 3 %. `describe` tells what was chosen.
    Longer inputs than were asked for take the fastest kernel that keeps no copy of the weight: give their rows too
    where speed is worth the memory.
    A decoder of a family that `fuse` knows then takes single tokens through all its layers in one call. On Linux the
    weights are gathered into huge pages.
    What was measured on this machine before, for such a layer, is not measured again.
    With an `example` convolutions are packed too (`pumice.engine.convolve`): timed at the sizes that they have with it, with
    batch norm, ReLU and what residual blocks add fused into them. For that the model's code is traced, and meanwhile no
    other thread may call a module.

    Args:
        batch: rows to optimise for, e.g. 1 for decoding one sequence.
        values: "bfloat16", "float16" or "float32" to change the model's type first; "int8", "int4" (`pumice methods
            values`) to round every layer to integers, which are kept where they run fastest, whatever that costs in
            quality; None keeps the numbers as they are: layers that were quantised before still run as integers.
        activations: "int8" lets layers of int8 round what goes into them to eight bits, a unit for each row found at
            every call, where that is faster (many rows, on CPUs that multiply bytes); None keeps them as they are.
        example: an input of the model, such as images [N, C, H, W], N as many as it will be given at once.
        remeasure: time everything again, whatever was measured before.

    Raises:
        PumiceError: a batch size below 1, an unknown type of values or activations, activations to be rounded with weights
            that are not, or an example that the model does not take.
    """
    rows = sorted({batch} if isinstance(batch, int) else set(batch))
    if not rows or any(not isinstance(size, int) or size < 1 for size in rows):
        raise PumiceError(f"batch={batch!r} must hold whole numbers of at least 1.")
    coding = None
    if isinstance(values, str) and values in FLOATS:
        model = model.to(getattr(torch, values))
    elif values is not None:
        coding = _coding(values)
    _check_activations(activations, coding, values, model)
    example = None if example is None else _as_model(model, example)
    found = None if example is None else look(unfuse_convolutions(model), example)
    sites = [] if found is None else found.sites
    jobs = list(_packable(model))
    budget = min(COLD_BYTES, sum(packed.dense_nbytes for _, _, packed in jobs))
    measured: dict[Any, list[Verdict]] = {}
    choices: list[LayerChoice] = []
    asked = Asked(rows, budget, remeasure, activations)
    with bar(len(jobs) + len(sites), "pack", enabled=progress, unit="layer") as shown, torch.no_grad():
        for name, module, packed in jobs:
            wanted = _as_integers(name, module, packed, coding)
            known = measured.setdefault(verdicts.kind_of(wanted), [])
            choice, new = _fastest(name, module, packed, wanted, known, asked)
            choices.append(choice)
            if new is not module:
                model = replace_module(model, name, new)
            shown.update()
        for site in sites:
            packing = pack_site(site, remeasure)
            choices.append(_convolution_choice(site, packing))
            model = replace_module(model, site.name, packing.module)
            shown.update()
        if found is not None:
            pack_others(found, _dtype(model))
            fuse_blocks(model, example)
    choices += _kept(model, {site.name for site in sites})
    # Before pages are gathered, which it would take apart.
    give_back()
    gather_weights(model)
    with suppress(PumiceError):  # of another family, or with a layer that no kernel for single tokens runs
        fuse(model)
    model.__dict__["_pumice_description"] = Description(choices, tuple(rows), torch.get_num_threads())
    return model


def unpack(model: nn.Module) -> nn.Module:
    """Every sparse layer as an ordinary dense one again, zeros written out, in place; returns the model."""
    model.__dict__.pop("_pumice_description", None)
    return densify(unfuse(unfuse_convolutions(model)))


def describe(model: nn.Module) -> Description:
    """How each layer of a model is stored and run; with timings and reasons after `pack`."""
    stored = model.__dict__.get("_pumice_description")
    return stored if stored is not None else Description([_state(*item) for item in _packable(model)] + _kept(model))


def _packable(model: nn.Module) -> Iterator[tuple[str, nn.Module, Packed]]:
    """Linear layers (sparse already or dense) whose weight is not shared with anything else."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            yield name, module, module.packed
        elif sparse_twin(module) is SparseLinear and owners[id(module.weight)] == 1 and not reads_weight(model, name):
            (view,) = module_views(name, module)
            w = view.matrix()
            if w.dtype in (torch.bfloat16, torch.float16, torch.float32) and not w.is_meta:
                yield name, module, pack_as(w.contiguous(), "dense")


def _check_activations(activations: str | None, coding: Coding | None, values: Any, model: nn.Module) -> None:
    if activations not in (None, "int8"):
        raise PumiceError(f"activations={activations!r} must be 'int8' or None (to keep them as they are).")
    if activations is None or (coding is not None and coding.bits == 8):
        return
    if coding is None and any(_is_int8(name, module) for name, module in model.named_modules()):
        return
    raise PumiceError(
        f"activations='int8' is for layers whose weights are int8, and with values={values!r} this model has none: "
        "give values='int8' as well."
    )


def _is_int8(name: str, module: nn.Module) -> bool:
    if isinstance(module, SparseModule):
        return module.layout.split("-")[0] == "int8"
    grid = kept(module_views(name, module))
    return grid is not None and grid.bits == 8


def _coding(values: str | Mapping[str, Any]) -> Coding | None:
    known = [info.name for info in registry.values.members()]
    name = values if isinstance(values, str) else values.get("name")
    if name not in known:
        raise PumiceError(
            f"values={values!r} must be one of {', '.join([*FLOATS, *known])} (or None to keep the numbers)."
        )
    return registry.values.bind(values)()


def _as_integers(name: str, module: nn.Module, packed: Packed, coding: Coding | None) -> Packed:
    """The matrix with the integers that it was quantised to, or is to be now; as it is where there are none."""
    grid = None if isinstance(module, SparseModule) else kept(module_views(name, module))
    if coding is None and grid is None:
        return packed
    w_OI = unpack_matrix(packed)
    if coding is not None and not (coding.group and w_OI.shape[1] % coding.group):
        grid = coding.grid(w_OI)
        w_OI = grid.snap(w_OI)
    if grid is None or not grid.fits(w_OI):
        return packed
    return pack_smallest(w_OI, None, grid)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _as_model(model: nn.Module, example: Any) -> Any:
    """An example with its floating-point tensors in the model's type, which `values` may have changed."""
    if isinstance(example, torch.Tensor):
        return example.to(_dtype(model)) if example.is_floating_point() else example
    if isinstance(example, Mapping):
        return {key: _as_model(model, value) for key, value in example.items()}
    return [_as_model(model, value) for value in example] if isinstance(example, list | tuple) else example


def _convolution_choice(site: Site, packing: Packing) -> LayerChoice:
    packed, verdict, images = packing.packed, packing.verdict, site.shape[0]
    return LayerChoice(
        site.name,
        packed.shape,
        packed.nonzero_share,
        packed.layout,
        packed.params,
        verdict.backends,
        {images: verdict.ms(images)},
        {images: verdict.best_dense[images].ms or 0.0},
        packed.nbytes + packing.extra,
        packed.dense_nbytes,
        verdict.reason,
        verdict.timings,
    )


def _kept(model: nn.Module, done: Container[str] = ()) -> list[LayerChoice]:
    """Weights that stay dense in memory because no sparse kernel runs their kind of layer."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, SparseModule) or name in done:
            continue
        reason = "no sparse kernel runs this kind of layer"
        if sparse_twin(module) is SparseLinear:
            if not reads_weight(model, name):
                continue
            reason = "the model's own code reads this weight at every call"
        elif sparse_twin(module) is SparseConv2d:
            reason = "convolutions are timed where pack is given an example"
        for view in module_views(name, module):
            found.append(_dense_choice(view, reason))
    return found


def _dense_choice(view: WeightView, reason: str) -> LayerChoice:
    w = view.matrix()
    density = 1.0 if w.is_meta else float((w != 0).float().mean())
    size = w.numel() * w.element_size()
    return LayerChoice(view.name, view.shape_OI, density, "dense", {}, {}, {}, {}, size, size, reason)


def _state(name: str, module: nn.Module, packed: Packed) -> LayerChoice:
    reason = "as stored; not measured on this machine yet" if isinstance(module, SparseLinear) else "an ordinary layer"
    return LayerChoice(
        name,
        packed.shape,
        packed.nonzero_share,
        packed.layout,
        packed.params,
        {},
        {},
        {},
        packed.nbytes,
        packed.dense_nbytes,
        reason,
    )


def _fastest(
    name: str, module: nn.Module, packed: Packed, wanted: Packed, known: list[Verdict], asked: Asked
) -> tuple[LayerChoice, nn.Module]:
    """The layer by a verdict for layers like it; by a new one, added to `known`, where those are for zeros elsewhere."""

    def followed(verdict: Verdict) -> tuple[LayerChoice, nn.Module]:
        # Rounded numbers are only for where integers run.
        return _apply(name, module, packed if verdict.layout == "dense" else wanted, verdict, asked)

    for verdict in known:
        with suppress(LayoutRefused):
            return followed(verdict)
    known.append(verdicts.verdict_of(wanted, asked, len(known)))
    try:
        return followed(known[-1])
    except LayoutRefused:
        # What was kept on disk came from another model.
        known[-1] = verdicts.verdict_of(wanted, asked._replace(remeasure=True), len(known) - 1)
        return followed(known[-1])


def _apply(
    name: str, module: nn.Module, packed: Packed, verdict: Verdict, asked: Asked
) -> tuple[LayerChoice, nn.Module]:
    """The layer as the verdict wants it, and the record of it."""
    plain = verdict.layout == "dense" and set(verdict.backends.values()) == {"torch"}
    if plain:
        new = module.to_dense() if isinstance(module, SparseModule) else module
        stored = packed.dense_nbytes
    else:
        target = repack(packed, verdict.layout, **verdict.params)
        if isinstance(module, SparseLinear):
            new = module if target is packed else SparseLinear(target, module.bias, transposed=module.transposed)
        else:
            new = SparseLinear.from_module(module, target)
        new.set_backends(_plan(target, verdict.backends, asked.activations), activations=asked.activations)
        # What backends share with each other is given by one function, so that it counts once.
        extras = {dispatch.get("linear", target.layout, name).extra for name in verdict.backends.values()}
        stored = new.packed.nbytes + sum(extra(new.packed) for extra in extras)
    choice = LayerChoice(
        name,
        packed.shape,
        packed.nonzero_share,
        verdict.layout,
        verdict.params,
        {rows: verdict.backends[rows] for rows in asked.rows},
        {rows: verdict.ms(rows) for rows in asked.rows},
        {rows: verdict.best_dense[rows].ms or 0.0 for rows in asked.rows},
        stored,
        packed.dense_nbytes,
        verdict.reason,
        verdict.timings,
    )
    return choice, new


def _plan(packed: Packed, backends: dict[int, str], activations: str | None) -> list[tuple[int | None, str]]:
    """Backends for all row counts: between two measured ones the border is their geometric mean, or where one refuses."""
    plan: list[tuple[int | None, str]] = []
    points = sorted(backends)
    for here, after in zip(points, [*points[1:], None], strict=True):
        name = backends[here]
        if after is None:
            plan.append((None, name))
        elif backends[after] != name:
            backend = dispatch.get("linear", packed.layout, name)
            limit = math.isqrt(here * after)
            kind = (packed.shape, packed.params, activations)
            while limit > here and backend.refuse(Call("linear", packed.layout, packed.dtype, "cpu", limit, *kind)):
                limit -= 1
            plan.append((limit, name))
    return plan
