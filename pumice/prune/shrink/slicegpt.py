"""SliceGPT: rotate the residual stream to its principal components and drop the smallest. Letters: D width, K kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from pumice.core import structure
from pumice.core.calls import call_model, hidden_of
from pumice.core.errors import PumiceError
from pumice.core.progress import bar
from pumice.core.registry import shrink
from pumice.core.stats import evaluating
from pumice.core.stream import Collect, Stream, Unit
from pumice.prune.shrink.base import Job, note_singular
from pumice.prune.shrink.blocks import first, sample, size, watching
from pumice.prune.shrink.residual import Branch, Residual, bias_of, find_residual, fold, rotate
from pumice.prune.shrink.trials import PassOn
from pumice.weights.residual import PlainRMSNorm, SlicedBlock

MULTIPLE = 8
"""Kept widths are multiples of it."""
ROTATIONS = ("each", "one")


@shrink("slicegpt", key="slicegpt", paper="arXiv:2401.15024", needs=("activations",))
def slicegpt(
    model: nn.Module,
    job: Job,
    *,
    rotations: Annotated[str, "each (a basis in front of every norm) or one (the same basis everywhere)"] = "each",
    head: Annotated[bool, "slice the final norm and the head too"] = False,
    width: Annotated[int, "kept width; 0 takes the largest multiple of 8 that meets the density"] = 0,
    samples: Annotated[int, "calibration windows for the covariances; 0 takes all"] = 0,
) -> nn.Module:
    """Rotate the residual stream to its principal components and delete the smallest (SliceGPT).

    Scale, shift and mean of every norm are folded into its neighbours, so that it is a plain RMSNorm, which commutes with
    every rotation. In front of each norm the stream is written in the eigenvectors of E[x xᵀ], x being what the norm
    gives on the dense model; the K directions of the largest eigenvalues stay. As each place has its own basis, the two
    residual connections of a block become matrices [K, K], whose parameters count: on a small model they eat much of
    what slicing saves. The last block writes the original basis, so that final norm and head stay; embeddings that were
    tied to the head get a (sliced) weight of their own. The norms divide by the mean over D values as before.

    Differences: the paper takes the covariances behind the already sliced blocks before, here they are those of the dense
    model, from one pass. `rotations="one"` is not in the paper: one basis for all places (the mean of their
    covariances) needs no matrices on the residual connections; a Llama-type model then stays an ordinary one with a
    smaller hidden size, head and final norm sliced too.

    Raises:
        PumiceError: an architecture that is not made of pre-norm blocks with RMSNorm or LayerNorm, a width outside
            [8, D], or a density that leaves less than 8.
    """
    if rotations not in ROTATIONS:
        raise PumiceError(f"option rotations={rotations!r} of shrink 'slicegpt' is not known: use each or one.")
    batches = sample(job, samples or 10**9)
    residual = find_residual(model, batches[0])
    plan = _Plan(rotations == "one", head or rotations == "one" or _needs_head(model, residual, batches[0]))
    if plan.head and not residual.final.readers:
        raise PumiceError(f"{type(model).__name__} has no head to slice: use rotations='each', head=False.")
    if job.density == 1 and not width:
        return model
    kept = _width(residual, plan, job.density, width)
    if plan.one and not residual.centred and not width:
        kept = _told_by_config(model, kept)
    before = _logits(model, batches[0])
    eps = [branch.eps for branch in [*residual.branches, residual.final]]
    fold(residual, model, head=plan.head)
    bases = _bases(_covariances(model, residual, plan, batches, job), plan)
    _replace(model, residual, plan, eps)
    rotate(residual, bases, [1.0] * len(bases))
    _connect(residual, plan, bases)
    _check_same(before, _logits(model, batches[0]), model)
    _truncate(model, residual, plan, kept)
    job.notes.append(f"{residual.blocks_name}: the residual stream has {kept} of {residual.width} directions")
    return model


@dataclass(frozen=True)
class _Plan:
    """One basis for all places or one for each; whether the last place, in front of the head, is sliced too."""

    one: bool
    head: bool

    def branches(self, residual: Residual) -> list[Branch]:
        """The branches whose norm reads a sliced stream."""
        return [*residual.branches, *([residual.final] if self.head else [])]


@torch.no_grad()
def _needs_head(model: nn.Module, residual: Residual, batch: Any) -> bool:
    """Whether the model's code expects behind the blocks the width that the embeddings have (GPT-2 does)."""
    wrapping: list[Any] = []

    def narrow(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output[..., :MULTIPLE]

    def see(index: int, args: Any, kwargs: Any, output: Any) -> None:
        wrapping.append(output)

    blocks = list(residual.layers)
    with watching([blocks[-1]], see), evaluating(model):
        call_model(model, first(batch))
    handles = [embedding.register_forward_hook(narrow) for embedding in residual.embeddings]
    try:
        for index in range(len(blocks)):
            residual.layers[index] = PassOn(wrapping[0])
        residual.layers[len(blocks) - 1] = PassOn(wrapping[0], hidden_of(wrapping[0]))
        call_model(model, first(batch))
    except RuntimeError:
        return True
    finally:
        for index, block in enumerate(blocks):
            residual.layers[index] = block
        for handle in handles:
            handle.remove()
    return False


def _width(residual: Residual, plan: _Plan, density: float, width: int) -> int:
    """The largest kept width whose blocks have at most `density` of their parameters, or the one asked for."""
    if width:
        if not MULTIPLE <= width <= residual.width:
            raise PumiceError(f"option width={width} of shrink 'slicegpt' is outside [{MULTIPLE}, {residual.width}].")
        return width
    dense = size(residual.layers)
    for kept in range(residual.width // MULTIPLE * MULTIPLE, 0, -MULTIPLE):
        if _parameters(residual, plan, kept) <= density * dense:
            return kept
    raise PumiceError(f"density={density} leaves shrink 'slicegpt' less than {MULTIPLE} directions: keep more.")


def _told_by_config(model: nn.Module, kept: int) -> int:
    """A width at or a little below `kept` that the config can state, as divisible by 2, 4, 8 as there is; else `kept`.

    Llama's config wants a multiple of the number of heads; a model that no config describes needs Pumice to load.
    """
    config = _config(model)
    if config is None:
        return kept
    told = [width for width in range(kept, kept - kept // 16 - 1, -1) if _accepts(config, width)]
    return max(told, key=lambda width: (math.gcd(width, MULTIPLE), width), default=kept)


def _config(model: nn.Module) -> Any:
    """The text config, where it states hidden size and head size apart; None otherwise."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return config if hasattr(config, "hidden_size") and getattr(config, "head_dim", None) else None


def _accepts(config: Any, width: int) -> bool:
    try:
        type(config).from_dict({**config.to_dict(), "hidden_size": width})
    except Exception:
        # Whatever a config class raises, it does not describe a model of this width.
        return False
    return True


def _parameters(residual: Residual, plan: _Plan, kept: int) -> int:
    """Parameters inside the blocks with `kept` directions."""
    full, total = residual.width, size(residual.layers)
    for index, branch in enumerate(residual.branches):
        assert branch.writer is not None
        behind = full if not plan.head and index == len(residual.branches) - 1 else kept
        total -= sum(view.shape_OI[0] for view in branch.readers) * (full - kept)
        bias = 0 if bias_of(branch.writer) is None else 1
        total -= (branch.writer.shape_OI[1] + bias) * (full - behind)
        shift = getattr(branch.norm, "bias", None)
        total += sum(view.shape_OI[0] for view in branch.readers if shift is not None and bias_of(view) is None)
        total -= size(branch.norm) if not plan.one or residual.centred else full - kept
        total += 0 if plan.one else kept * behind
    return total


@torch.no_grad()
def _logits(model: nn.Module, batch: Any) -> Tensor:
    """Outputs of the first sample, in the model's own precision."""
    with evaluating(model):
        output = call_model(model, first(batch))
    return hidden_of(output).float() if not hasattr(output, "logits") else output.logits.float()


def _check_same(before: Tensor, after: Tensor, model: nn.Module) -> None:
    wide = next(model.parameters()).dtype == torch.float32
    gap = float((after - before).abs().max()) / max(float(before.abs().max()), 1e-12)
    if not gap < (1e-2 if wide else 0.3):
        raise PumiceError(
            f"{type(model).__name__} computes something else in another basis (outputs differ by {gap:.2g} of their "
            "largest): it is not made of pre-norm blocks alone; use another method."
        )


def _covariances(model: nn.Module, residual: Residual, plan: _Plan, batches: list[Any], job: Job) -> list[Tensor]:
    """E[x xᵀ] of what every norm gives, of the dense model."""
    views = [branch.readers[0] for branch in plan.branches(residual)]
    stream = Stream(model, views, batches, compute=job.compute)
    singular: list[str] = []
    found: dict[str, Tensor] = {}
    with bar(len(stream.units), "covariances", enabled=job.progress, unit="block") as shown:

        def visit(unit: Unit, collect: Collect) -> None:
            for name, stats in collect(frozenset({"hessian"})).items():
                found[name] = stats["hessian"][0]
                singular.extend([name] if collect.tokens[name] < residual.width else [])
            shown.update()

        stream.walk(visit)
    note_singular(job, singular)
    return [found[view.name] for view in views]


def _bases(covariances: list[Tensor], plan: _Plan) -> list[Tensor | None]:
    """Eigenvectors by falling eigenvalue [D, D] in front of every branch and behind the last."""

    def components(covariance: Tensor) -> Tensor:
        return torch.linalg.eigh(covariance.double()).eigenvectors.flip(1)

    if plan.one:
        return [components(torch.stack(covariances).mean(0))] * len(covariances)
    return [*(components(covariance) for covariance in covariances), *([] if plan.head else [None])]


def _replace(model: nn.Module, residual: Residual, plan: _Plan, eps: list[float]) -> None:
    """Blocks with matrices on their residual connections where bases differ; plain norms in the place of LayerNorms."""
    for index, part in enumerate([] if plan.one else residual.parts):
        structure.replace(
            model,
            f"{residual.blocks_name}.{index}",
            SlicedBlock,
            attention=part.attention,
            ffn=list(part.ffn),
            width=residual.width,
            eps=eps[2 * index : 2 * index + 2],
        )
    if residual.centred:
        own = len(residual.branches) if not plan.one else 0
        for branch, one in list(zip(plan.branches(residual), eps, strict=False))[own:]:
            branch.norm = structure.replace(model, branch.norm_name, PlainRMSNorm, width=residual.width, eps=one)


def _shortcuts(residual: Residual, plan: _Plan) -> list[nn.Linear]:
    """The matrices on the residual connections, in the order of the branches."""
    blocks = [block for block in residual.layers if isinstance(block, SlicedBlock) and not plan.one]
    return [shortcut for block in blocks for shortcut in (block.shortcut_1, block.shortcut_2)]


@torch.no_grad()
def _connect(residual: Residual, plan: _Plan, bases: list[Tensor | None]) -> None:
    """The matrices on the residual connections: from the basis before a branch to the one behind it."""
    for at, shortcut in enumerate(_shortcuts(residual, plan)):
        here, behind = bases[at], bases[at + 1]
        if here is not None:
            shortcut.weight.copy_(here if behind is None else behind.t() @ here)


@torch.no_grad()
def _truncate(model: nn.Module, residual: Residual, plan: _Plan, kept: int) -> None:
    """Drop all but the first directions everywhere."""
    full, places = residual.width, len(residual.branches) + 1
    leading = torch.eye(full, kept)
    bases = [*[leading] * (places - 1), leading if plan.head else None]
    rotate(residual, bases, [(full / kept) ** 0.5] * places)
    for at, shortcut in enumerate(_shortcuts(residual, plan)):
        behind = full if at == places - 2 and not plan.head else kept
        structure.resize(shortcut.weight, shortcut.weight[:behind, :kept].clone())
        structure.refresh(shortcut)
    for branch in plan.branches(residual):
        # In a sliced block the norm has no weight any more.
        if isinstance(weight := branch.norm._parameters.get("weight"), Tensor):
            structure.resize(weight, weight[:kept].clone())
            structure.refresh(branch.norm)
    _state(model, kept, plan.one and not residual.centred)


def _state(model: nn.Module, kept: int, ordinary: bool) -> None:
    """The config says the hidden size where the model is still the one that it describes."""
    config = _config(model)
    if ordinary and config is not None and _accepts(config, kept):
        config.hidden_size = kept
    else:
        structure.note_shapes(model)
