"""Who reads and who writes the residual stream of a pre-norm transformer, and how its basis is changed.

Shapes: V rows of an embedding, O outputs, I inputs, D model width, K kept directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core import structure
from pumice.core.calls import hidden_of
from pumice.core.errors import PumiceError
from pumice.core.view import WeightView, module_views
from pumice.prune.shrink.blocks import PROBE, Parts, find_blocks, find_parts, passes, watching


@dataclass
class Branch:
    """A norm, the layers that read what it gives, and the one whose output is added to the stream."""

    norm: nn.Module
    norm_name: str
    readers: list[WeightView] = field(default_factory=list)
    writer: WeightView | None = None

    @property
    def eps(self) -> float:
        for name in ("eps", "variance_epsilon", "epsilon"):
            if isinstance(value := getattr(self.norm, name, None), float):
                return value
        raise PumiceError(f"{self.norm_name} ({type(self.norm).__name__}) states no epsilon: it cannot be folded.")


@dataclass
class Residual:
    """Everything on the residual stream: two branches per block, the embeddings before, norm and head behind."""

    blocks_name: str
    layers: nn.ModuleList
    parts: list[Parts]
    branches: list[Branch]
    embeddings: list[nn.Embedding]
    final: Branch
    width: int
    centred: bool
    """Whether the norms subtract the mean (LayerNorm)."""


def find_residual(model: nn.Module, batch: Any) -> Residual:
    """Read off a pass of one batch who is on the residual stream.

    Raises:
        PumiceError: the model is not made of pre-norm blocks, or a norm or a reader is of a kind that cannot be rotated.
    """
    name, layers = find_blocks(model)
    parts = find_parts(model, layers, batch)
    branches = [
        Branch(layers[index].get_submodule(norm), f"{name}.{index}.{norm}")
        for index, part in enumerate(parts)
        for norm in (part.norm_1, part.norm_2)
    ]
    _find_neighbours(model, branches, _linear_maps(name, layers, parts), batch)
    final = _find_final(model, layers, batch)
    width = branches[0].readers[0].shape_OI[1]
    inside = {id(module) for module in layers.modules()}
    outside = [one for one in model.modules() if isinstance(one, nn.Embedding) and id(one) not in inside]
    embeddings = [one for one in outside if one.embedding_dim == width]
    if not embeddings:
        raise PumiceError(f"{type(model).__name__} has no embedding of the width {width} of its blocks: not supported.")
    centred = isinstance(branches[0].norm, nn.LayerNorm)
    for branch in [*branches, final]:
        _gain(branch.norm, branch.norm_name)
        if isinstance(branch.norm, nn.LayerNorm) != centred:
            raise PumiceError(f"{branch.norm_name}: norms with and without mean in one model cannot be folded.")
    return Residual(name, layers, parts, branches, embeddings, final, width, centred)


def _linear_maps(blocks_name: str, layers: nn.ModuleList, parts: Sequence[Parts]) -> list[tuple[WeightView, int]]:
    """Every weight inside the blocks, with the number of the branch that it lies in."""
    maps = []
    for index, part in enumerate(parts):
        for name, module in layers[index].named_modules():
            top = name.split(".")[0]
            views = module_views(f"{blocks_name}.{index}.{name}", module)
            if top in (part.norm_1, part.norm_2) or not views:
                continue
            if len(views) > 1 or not hasattr(module, "bias"):
                raise PumiceError(f"{blocks_name}.{index}.{name}: expert tensors cannot be rotated.")
            maps.append((views[0], 2 * index + (top != part.attention)))
    return maps


def _find_neighbours(
    model: nn.Module, branches: Sequence[Branch], maps: Sequence[tuple[WeightView, int]], batch: Any
) -> None:
    """Fill in who reads each branch's norm (the very tensor that it gives), and which of its layers runs last."""
    # The tensors are held, or the id of one could come back as another's.
    given: dict[int, tuple[Tensor, Branch]] = {}

    def see(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if index < len(branches):
            given[id(output)] = output, branches[index]
            return
        view, branch = maps[index - len(branches)]
        if args and id(args[0]) in given:
            given[id(args[0])][1].readers.append(view)
        branches[branch].writer = view

    with watching([*(branch.norm for branch in branches), *(view.module for view, _ in maps)], see):
        for _ in passes(model, [batch], "probe", PROBE):
            pass
    for branch in branches:
        if not branch.readers or branch.writer is None:
            raise PumiceError(f"{branch.norm_name}: no layer reads it directly, so that it cannot be folded.")


def _find_final(model: nn.Module, layers: nn.ModuleList, batch: Any) -> Branch:
    """The norm that reads what the last block gives, with the head as its reader."""
    leaves = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    last: list[Tensor] = []
    found: list[Branch] = []

    def see(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if index == 0:
            last.append(hidden_of(output))
        elif last and args and args[0] is last[0]:
            name, module = leaves[index - 1]
            found.append(Branch(module, name))

    with watching([layers[len(layers) - 1], *(module for _, module in leaves)], see):
        for _ in passes(model, [batch], "probe", PROBE):
            pass
    if len(found) != 1:
        raise PumiceError(f"{type(model).__name__} has no single norm behind its last block: it cannot be rotated.")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    name = next((name for name, module in leaves if module is head), None)
    found[0].readers = module_views(name, head) if isinstance(head, nn.Module) and name is not None else []
    return found[0]


def _gain(norm: nn.Module, name: str) -> Tensor:
    """What the norm multiplies with, [D]; told from what it does, since some count their weight from one."""
    weight = getattr(norm, "weight", None)
    width = len(weight) if isinstance(weight, Tensor) else 0
    x = torch.randn(2, max(width, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if width:
        with torch.no_grad():
            got = norm(x.to(weight)).double().cpu()  # type: ignore[arg-type]
        bias = getattr(norm, "bias", None)
        got = got if bias is None else got - bias.detach().double().cpu()
        if isinstance(norm, nn.LayerNorm):
            x = x - x.mean(1, keepdim=True)
        plain = x * torch.rsqrt(x.square().mean(1, keepdim=True))
        own = weight.detach().double().cpu()  # type: ignore[union-attr]
        for gain in (own, own + 1):
            if torch.allclose(got, plain * gain, rtol=2e-2, atol=2e-2 * float(gain.abs().max())):
                return gain
    raise PumiceError(f"{name} ({type(norm).__name__}) is neither RMSNorm nor LayerNorm: it cannot be folded.")


def put(view: WeightView, w_OI: Tensor) -> None:
    """Give a layer a weight of another shape; what the module says of its size follows."""
    old = view.tensor
    structure.resize(old, (w_OI.t() if view.transposed else w_OI).to(old).contiguous())
    structure.refresh(view.module)


def bias_of(view: WeightView) -> Tensor | None:
    bias = getattr(view.module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


@torch.no_grad()
def fold(residual: Residual, model: nn.Module, head: bool) -> None:
    """Move scale, shift and mean of the norms into their neighbours; the model computes what it did.

    Afterwards every norm is x / sqrt(mean(x²) + eps) on a stream whose mean is zero (where there were LayerNorms). The
    final norm stays as it is unless `head`. Embeddings are untied from whatever shares them.
    """
    _untie(residual, model)
    for branch in [*residual.branches, *([residual.final] if head else [])]:
        gain = _gain(branch.norm, branch.norm_name)
        shift = getattr(branch.norm, "bias", None)
        for view in branch.readers:
            w = view.read().double()
            if shift is not None and bool(shift.any()):
                _add_bias(view, w @ shift.detach().double().cpu())
            put(view, w * gain)
        if shift is not None:
            shift.zero_()
        neutral = torch.ones_like(gain) - (gain - branch.norm.weight.double().cpu())  # type: ignore[union-attr]
        branch.norm.weight.copy_(neutral)  # type: ignore[union-attr]
    if residual.centred:
        for embedding in residual.embeddings:
            embedding.weight.sub_(embedding.weight.mean(1, keepdim=True))
        for branch in residual.branches:
            assert branch.writer is not None
            w, bias = branch.writer.read(), bias_of(branch.writer)
            branch.writer.write(w - w.mean(0))
            if bias is not None:
                bias.sub_(bias.mean())


def _add_bias(view: WeightView, value_O: Tensor) -> None:
    bias = bias_of(view)
    if bias is None:
        view.module.bias = nn.Parameter(value_O.to(view.tensor), requires_grad=view.tensor.requires_grad)
    else:
        bias.add_(value_O.to(bias))


def _untie(residual: Residual, model: nn.Module) -> None:
    """What shares the weight of an embedding gets its own."""
    shared = {id(embedding.weight) for embedding in residual.embeddings}
    for module in model.modules():
        if not isinstance(module, nn.Embedding) and id(module._parameters.get("weight")) in shared:
            old = module._parameters["weight"]
            assert old is not None
            module.weight = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            config = getattr(model, "config", None)
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False  # type: ignore[union-attr]


@torch.no_grad()
def rotate(residual: Residual, bases: Sequence[Tensor | None], gains: Sequence[float]) -> None:
    """Write the weights in other bases of the stream, and drop the directions that these leave out.

    Args:
        bases: in front of every branch and behind the last, orthonormal columns [D, K]; None leaves the stream there.
        gains: factor of the readers of each branch (and of the head), which makes up for a norm over fewer values.
    """
    for embedding in residual.embeddings:
        if bases[0] is not None:
            structure.resize(embedding.weight, _times(embedding.weight, bases[0]).to(embedding.weight))
            structure.refresh(embedding)
    for index, branch in enumerate([*residual.branches, residual.final]):
        here, behind = bases[index], bases[min(index + 1, len(bases) - 1)]
        if here is not None:
            for view in branch.readers:
                put(view, _times(view.read(), here) * gains[index])
        if branch.writer is not None and behind is not None:
            put(branch.writer, _times(branch.writer.read().t(), behind).t())
            if (bias := bias_of(branch.writer)) is not None:
                structure.resize(bias, _times(bias[None], behind)[0].to(bias))


def _times(rows: Tensor, basis_DK: Tensor) -> Tensor:
    return (rows.double() @ basis_DK.to(rows.device, torch.float64)).float()
