"""`pumice.rewrite`: layers become other modules that compute nearly the same from fewer bytes, block by block."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.core.progress import bar
from pumice.core.stats import split_needs
from pumice.core.stream import Collect, Stream, Unit
from pumice.core.view import DEFAULT_IGNORE, find_views
from pumice.engine.data import make_data
from pumice.engine.plan import compute_dtype
from pumice.prune.layer import Selector
from pumice.weights.modules import reads_weight, replace_module
from pumice.weights.patterns.base import Pattern, parse


@dataclass
class RewriteResult:
    """Which layers were rewritten, and the relative change of each weight, ‖W−W'‖/‖W‖."""

    method: dict[str, Any]
    layers: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rewrite(
    model: nn.Module,
    method: Any,
    *,
    pattern: str | Pattern = "2:4",
    density: float | None = None,
    data: Any = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = DEFAULT_IGNORE,
    tokenizer: Any = None,
    samples: int = 64,
    seqlen: int = 1024,
    seed: int = 0,
    compute: str = "auto",
    progress: bool = True,
) -> RewriteResult:
    """Replace the linear layers of a model in memory, in place; each block is calibrated behind the rewritten ones.

    Args:
        model: any module whose `Linear` layers lie inside it (a lone layer cannot be replaced in place).
        method: a rewrite (`pumice methods` lists them), or `{"name": …, option: …}`.
        pattern, density: of the sparse part, where the method has one.
        data, tokenizer, samples, seqlen, seed, compute: as `pumice.prune` takes them.

    Raises:
        PumiceError: an unknown method or option, or a layer that the pattern does not fit, before any work.
    """
    start = time.perf_counter()
    bound = registry.rewrite.bind(method)
    legal = parse(pattern)
    share = legal.density(density)
    needs, whole = split_needs(bound.info.needs)
    if whole:
        raise PumiceError(f"rewrite {bound.name!r} needs {', '.join(sorted(whole))}, which rewriting does not collect.")
    views = find_views(model, targets, ignore)
    if any(view.module is model for view in views):
        raise PumiceError("model is a single layer: put it into nn.Sequential, so that it can be replaced in place.")
    result = RewriteResult(bound.describe())
    chosen = [v for v in views if type(v.module) is nn.Linear and not reads_weight(model, v.module_name)]
    for view in chosen:
        legal.check_shape(view.module_name, *view.shape_OI, share)
    for name in sorted({v.module_name for v in views} - {v.module_name for v in chosen}):
        result.notes.append(f"{name} stays as it is: only Linear layers whose weight nobody else reads are rewritten")
    batches = make_data(model, tokenizer, data, samples=samples, seqlen=seqlen, seed=seed)
    stream = Stream(model, chosen, batches, compute=compute_dtype(compute, model))
    with bar(len(stream.units), f"rewrite ({bound.name})", enabled=progress, unit="block") as shown:

        def visit(unit: Unit, collect: Collect) -> None:
            stats = collect(needs)
            for view in unit.views:
                if view.name not in stats:
                    continue
                w = view.read()
                own = {name: value[0] for name, value in stats[view.name].items()}
                new = bound(view.module, w, own, Selector(legal, share))
                result.layers[view.name] = float((w - new.weight.float()).norm() / w.norm().clamp(min=1e-30))
                replace_module(model, view.module_name, new)
                if unit.module is view.module:
                    unit.module = new
            shown.update()

        stream.walk(visit)
    for view in chosen:
        if view.name not in result.layers:
            result.notes.append(f"{view.name} stays as it is: the calibration data never reached it")
    result.seconds = time.perf_counter() - start
    return result
