"""What structured methods share: the request, the blocks, the groups inside them, and how many units go.

Shapes: U units of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.stream import block_lists
from pumice.prune.trace import Group, explore
from pumice.prune.trace.tracer import WHOLE

MULTIPLE = 16
"""Widths are rounded down to multiples of this, which dense kernels compute without a remainder."""


@dataclass
class Job:
    """One request to make a model smaller by removing whole channels, heads, blocks or directions.

    Args:
        density: share of the parameters inside the blocks to keep, in (0, 1].
        batches: calibration batches as the model takes them; empty where nobody gave data.
        notes: what the user should know of the result; methods append to it.
        seed: of everything that is drawn.
        compute: dtype of the matrix products while calibrating.
        loss: `f(model, batch) -> scalar` for models that return no loss.
    """

    density: float
    batches: list[Any] = field(default_factory=list)
    progress: bool = True
    notes: list[str] = field(default_factory=list)
    seed: int = 0
    compute: torch.dtype = torch.float32
    loss: Callable[[nn.Module, Any], Tensor] | None = None


def block_names(model: nn.Module) -> list[str]:
    """The blocks of a model: the children of its outermost module lists and sequentials; [""] where it has none."""
    found = [name for name, module in block_lists(model) if any(True for _ in module.parameters())]
    return found or [""]


def block_parameters(model: nn.Module) -> int:
    """Parameters inside the blocks, which a density is a share of; tied ones once."""
    inside = {id(p): p.numel() for name in block_names(model) for p in model.get_submodule(name).parameters()}
    return sum(inside.values())


def example_of(model: nn.Module, job: Job) -> Any:
    """A batch that the model runs on: the first calibration batch, or one made from its config.

    Raises:
        PumiceError: there is neither.
    """
    if job.batches:
        return job.batches[0]
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if main == "input_ids" and config is not None:
        ids = torch.arange(8)[None] % config.get_text_config().vocab_size
        ids = ids.to(next(model.parameters()).device)
        return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
    if main == "pixel_values" and config is not None and getattr(config, "image_size", None):
        size = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
        weight = next(model.parameters())
        pixels = torch.zeros(1, getattr(config, "num_channels", 3), *size, dtype=weight.dtype, device=weight.device)
        return {main: pixels}
    raise PumiceError(
        f"data=None: to see how the layers of {type(model).__name__} hang together it must run once; pass data=… with a "
        "batch as it takes them."
    )


def inner_groups(model: nn.Module, job: Job, kinds: Sequence[str] = ("channel", "head")) -> list[Group]:
    """Groups that lie inside one block each (all groups where none does), of these kinds.

    Raises:
        PumiceError: the model has none; says what stood in the way.
    """
    traced = explore(model, example_of(model, job))
    inside = [group for group in traced.groups if group.block is not None] or traced.groups
    found = [group for group in inside if group.kind in kinds]
    if traced.unreached:
        job.notes.append(f"{some(traced.unreached)}: the data never came there, so that nothing was taken from them")
    if not found:
        reasons = sorted({reason for reason in traced.left.values() if "not followed" in reason or "run" in reason})
        if "head" in kinds and WHOLE in traced.left.values():
            reasons.append("a block's heads belong to a single group, of which one has to stay")
        why = "; ".join(reasons[:3]) or "no weight's outputs are read by another weight only"
        raise PumiceError(
            f"{type(model).__name__} has no {' or '.join(kinds)}s that could be taken out of its blocks: {why}."
        )
    return found


def removable(model: nn.Module, groups: Sequence[Group], job: Job) -> int:
    """Parameters that have to go to reach the density.

    Raises:
        PumiceError: more than these groups hold, one unit of each left.
    """
    total = block_parameters(model)
    budget = round(total * (1 - job.density))
    most = sum(group.cost(model) * (group.units - 1) for group in groups)
    if budget > most:
        raise PumiceError(
            f"density={job.density:g} cannot be reached by removing {' and '.join(sorted({g.kind for g in groups}))}s "
            f"alone, which hold {most / total:.0%} of the parameters inside the blocks: ask for {1 - most / total:.2f} or "
            "more, or take another method."
        )
    return budget


def some(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def note_singular(job: Job, names: Sequence[str]) -> None:
    """Say of which layers fewer tokens were seen than they have inputs."""
    if names:
        job.notes.append(
            f"{some(names)} read fewer calibration tokens than they have inputs: what no token showed is left to damping "
            "or to chance; take more or longer samples"
        )


def calibrated(method: str, job: Job) -> list[Any]:
    """The calibration batches; PumiceError where there are none."""
    if not job.batches:
        raise PumiceError(f"data=None: method {method!r} measures activations and needs calibration data; pass data=….")
    return job.batches


Scores = Mapping[str, Tensor]
"""Group name -> scores [U]; the units with the highest stay."""
