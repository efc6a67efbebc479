"""`pumice.shrink`: whole channels, heads, blocks or directions removed, so that a smaller ordinary model is left."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core import registry, structure
from pumice.core.errors import PumiceError
from pumice.core.registry import Bound
from pumice.core.select import check_density
from pumice.core.undo import restored_on_failure
from pumice.engine.data import make_data
from pumice.engine.models import load_model, model_kind
from pumice.engine.ordinary import settle
from pumice.engine.plan import compute_dtype
from pumice.engine.store import save
from pumice.prune.run import peak_memory_bytes
from pumice.prune.shrink.base import Job, block_parameters, example_of
from pumice.prune.trace import explore

log = logging.getLogger("pumice")


@dataclass
class ShrinkResult:
    """A model that became smaller, and what became of it.

    `density` is the share of the parameters inside the blocks that stayed; `ordinary` says that the model's config
    describes it wholly, so that its checkpoint needs no Pumice.
    """

    model: nn.Module = field(repr=False)
    method: dict[str, Any]
    asked: float
    density: float
    parameters: dict[str, int]
    ordinary: bool
    seconds: float
    peak_memory_bytes: int
    notes: list[str] = field(default_factory=list)
    tokenizer: Any = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON."""
        return {name: value for name, value in vars(self).items() if name not in ("model", "tokenizer")}


@dataclass(frozen=True)
class _Settings:
    """How a model is loaded and calibrated: the arguments of `shrink` beside the request itself."""

    data: Any = None
    tokenizer: Any = None
    samples: int = 64
    seqlen: int = 1024
    seed: int = 0
    compute: str = "auto"
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    progress: bool = True
    device: str = "cpu"
    dtype: str = "auto"


def shrink(
    model: nn.Module | str | Path,
    method: str | Mapping[str, Any],
    *,
    density: float,
    data: Any = None,
    tokenizer: Any = None,
    samples: int = 64,
    seqlen: int = 1024,
    seed: int = 0,
    compute: str = "auto",
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Make a model smaller by removing whole structures; what comes back is an ordinary module without any zeros.

    A module that was given is changed in place when everything has worked. Where the call fails or is interrupted it is
    as it was; for that a copy of its weights is held while the call lasts. A model given by name has no such copy.

    Args:
        model: any module (changed in place), or the name of one to load.
        method: a name (`pumice.methods("shrink")`), or `{"name": …, option: …}`.
        density: share of the parameters inside the blocks that stays, in (0, 1].
        data: calibration data as `pumice.prune` takes it; None takes a text that every Python has, where a method
            measures and the model reads text.
        samples, seqlen, seed, compute: how it is calibrated, as in `pumice.prune`.
        loss: `f(model, batch)` for methods that need gradients of models that return no loss.

    Returns:
        The model. Notes (what could not be reached, how it has to be saved) go to the log `pumice`; `shrink_result`
        returns them.

    Raises:
        PumiceError: an unknown method or option, a density outside (0, 1] or out of reach, no data where it is needed,
            a model in which nothing can be removed.
    """
    result = shrink_result(
        model,
        method,
        density=density,
        data=data,
        tokenizer=tokenizer,
        samples=samples,
        seqlen=seqlen,
        seed=seed,
        compute=compute,
        loss=loss,
        progress=progress,
    )
    for note in result.notes:
        log.info(note)
    return result.model


def shrink_result(
    model: nn.Module | str | Path, method: str | Mapping[str, Any], *, density: float, **settings: Any
) -> ShrinkResult:
    """`shrink`, with everything that there is to say about it; `settings` are its arguments, device and dtype."""
    given = _Settings(**settings)
    bound = registry.shrink.bind(method)
    check_density(density)
    mine = not isinstance(model, nn.Module)
    tokenizer = given.tokenizer
    if not isinstance(model, nn.Module):
        loaded = load_model(model, dtype=given.dtype, device=given.device)
        model, tokenizer = loaded.model, tokenizer or loaded.tokenizer
    _check_dense(model)
    windows = {"samples": given.samples, "seqlen": given.seqlen, "seed": given.seed}
    batches = _batches(model, bound, given.data, tokenizer, windows)
    products = compute_dtype(given.compute, model)
    job = Job(density, batches, given.progress, seed=given.seed, compute=products, loss=given.loss)
    before = {"all": _parameters(model), "blocks": block_parameters(model)}
    start = time.perf_counter()
    with nullcontext() if mine else restored_on_failure(model):
        done: nn.Module = bound(model, job)
        ordinary = settle(done)
    seconds = time.perf_counter() - start
    after = {"all": _parameters(done), "blocks": block_parameters(done)}
    reached = after["blocks"] / max(before["blocks"], 1)
    result = ShrinkResult(
        done,
        bound.describe(),
        density,
        reached,
        {**{f"{key}_before": value for key, value in before.items()}, **after},
        ordinary,
        seconds,
        peak_memory_bytes(),
        job.notes,
        tokenizer,
    )
    result.notes += _about(result)
    return result


def save_shrunk(result: ShrinkResult, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write the model: a plain Transformers checkpoint where its config tells everything, else Pumice's format."""
    plain = result.ordinary and hasattr(result.model, "save_pretrained")
    facts = {name: value for name, value in result.to_dict().items() if name != "notes"}
    return save(
        result.model,
        out,
        format="dense" if plain else "pumice",
        overwrite=overwrite,
        tokenizer=result.tokenizer,
        metadata={"shrink": facts},
    )


@dataclass
class ShrinkPlan:
    """What could be removed from a model, without removing it."""

    method: dict[str, Any]
    asked: float
    parameters: dict[str, int]
    groups: list[dict[str, Any]]
    left: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def plan_shrink(
    model: nn.Module | str | Path, method: str | Mapping[str, Any], *, density: float, data: Any = None, **unused: Any
) -> ShrinkPlan:
    """The groups of channels and heads in a model and what is left alone; raises what is known beforehand."""
    del unused
    bound = registry.shrink.bind(method)
    check_density(density)
    module = model if isinstance(model, nn.Module) else load_model(model).model
    _check_dense(module)
    traced = explore(module, example_of(module, Job(density, _ready(module, data))))
    groups = [
        {
            "name": group.name,
            "kind": group.kind,
            "units": group.units,
            "params_per_unit": group.cost(module),
            "block": group.block,
        }
        for group in traced.groups
    ]
    blocks = block_parameters(module)
    parameters = {"all": _parameters(module), "blocks": blocks, "to_remove": round(blocks * (1 - density))}
    notes = [f"operators that are not followed: {', '.join(traced.unknown)}"] if traced.unknown else []
    return ShrinkPlan(bound.describe(), density, parameters, groups, traced.left, notes)


def _ready(model: nn.Module, data: Any) -> list[Any]:
    """One batch of data that needs no tokenizer; text is not needed to see the structure."""
    return [] if data is None or isinstance(data, str | Path) else make_data(model, None, data, samples=1)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check_dense(model: nn.Module) -> None:
    from pumice.weights.modules import SparseModule

    packed = next((name for name, module in model.named_modules() if isinstance(module, SparseModule)), None)
    if packed is not None:
        raise PumiceError(
            f"layer {packed!r} is packed: shrink works on dense weights, call pumice.unpack(model) first."
        )


def _batches(
    model: nn.Module, bound: Bound, data: Any, tokenizer: Any, windows: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Calibration batches, or none where nothing needs them and none were given."""
    if data is None and not bound.info.needs:
        return []
    if data is None and model_kind(model) == "module":
        raise PumiceError(
            f"data=None: method {bound.name!r} needs {', '.join(bound.info.needs)}, and {type(model).__name__} reads no text "
            "that could stand in; pass data=… with batches as it takes them."
        )
    batches = make_data(model, tokenizer, data, labels=True, **windows)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]


def _about(result: ShrinkResult) -> list[str]:
    notes = []
    if abs(result.density - result.asked) > 0.01:
        notes.append(
            f"{result.density:.1%} of the parameters inside the blocks are left, {result.asked:.1%} were asked for: units "
            "go as a whole"
        )
    if result.ordinary or not structure.changed(result.model):
        return notes
    if hasattr(result.model, "save_pretrained"):
        notes.append(
            "the layers have different widths or lack parts, which no config of Transformers can say: saved in Pumice's "
            "format, which from_pretrained reads after import pumice"
        )
    else:
        notes.append("load it with pumice.load(path, into=the module as it was built before it shrank)")
    return notes
