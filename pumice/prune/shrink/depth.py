"""Depth pruning: whole blocks are removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import nn

from pumice.core import select, structure
from pumice.core.errors import PumiceError
from pumice.core.progress import bar
from pumice.core.registry import shrink
from pumice.prune.shrink.base import Job
from pumice.prune.shrink.blocks import find_blocks, sample, similarities, size
from pumice.prune.shrink.trials import PassOn, Trials

CRITERIA = ("influence", "loss")


@shrink("depth", paper="arXiv:2403.03853", needs=("activations",))
def depth(
    model: nn.Module,
    job: Job,
    *,
    by: Annotated[str, "influence (one pass) or loss (greedy, measured)"] = "influence",
    samples: Annotated[int, "calibration windows measured on; 0 takes all (influence) or 16 (loss)"] = 0,
) -> nn.Module:
    """Remove the blocks that change the residual stream, or the loss, the least (ShortGPT; greedy by loss).

    `influence`: a block's influence is 1 − mean over tokens of cos(x_in, x_out), measured once on the whole model; the
    blocks with the smallest go. `loss`: one after the other, the block goes without which the calibration loss is
    lowest, measured on the model as it is by then; this costs about blocks² / 2 partial passes for every block removed
    but sees what influence does not. Blocks are removed until at most `density` of their parameters is left.

    The result is the same architecture with fewer blocks: an ordinary Transformers model whose config says so.

    Raises:
        PumiceError: unknown criterion, no list of blocks, a density of less than one block, no data, or a config whose meaning hangs on block numbers.
    """
    if by not in CRITERIA:
        raise PumiceError(f"option by={by!r} of shrink 'depth' is not known: use {' or '.join(CRITERIA)}.")
    name, layers = find_blocks(model)
    if structure.changed(model):
        raise PumiceError(
            f"{type(model).__name__} was shrunk before, block by block: remove blocks first, then channels."
        )
    if (config := config_of(model, name)) is not None:
        _check_config(model, config, name, len(layers))
    least = min(map(size, layers)) / max(size(layers), 1)
    if least > job.density:
        raise PumiceError(
            f"density={job.density:g} cannot be reached by removing blocks: one of {len(layers)} has to stay, which holds "
            f"{least:.1%} of their parameters; ask for more than that, or take another method."
        )
    batches = sample(job, samples or (10**9 if by == "influence" else 16))
    if by == "influence":
        measured = similarities(model, layers, batches, lambda cosine: 1 - cosine, job)
        gone = _least(measured, [size(block) for block in layers], job.density)
    else:
        gone = _greedy(model, layers, batches, job)
    kept = [index for index in range(len(layers)) if index not in gone]
    keep_blocks(model, name, layers, kept)
    job.notes.append(f"{name}: {len(gone)} of {len(gone) + len(kept)} blocks removed: {_ranges(gone)}")
    return model


def _least(measured: Sequence[float], sizes: Sequence[int], density: float) -> list[int]:
    """The blocks of the smallest measure whose removal leaves at most `density` of all parameters."""
    budget = sum(sizes) * density
    for keep in range(len(sizes), 0, -1):
        mask = select.topk(torch.tensor(measured, dtype=torch.float64), keep)
        if sum(s for s, kept in zip(sizes, mask.tolist(), strict=True) if kept) <= budget or keep == 1:
            return [index for index, kept in enumerate(mask.tolist()) if not kept]
    return []


def _greedy(model: nn.Module, layers: nn.ModuleList, batches: list[Any], job: Job) -> list[int]:
    """The blocks removed one by one, each time the one without which the loss is lowest; leaves the model unchanged."""
    everything = list(layers)
    budget = sum(size(block) for block in everything) * job.density
    left = list(range(len(everything)))
    trials = Trials(model, layers, batches, job.compute)
    try:
        with bar(
            max(1, round(len(left) * (1 - job.density))), "remove blocks", enabled=job.progress, unit="block"
        ) as shown:
            while len(left) > 1 and sum(size(everything[index]) for index in left) > budget:
                losses = {index: trials.loss(index) for index in left}
                worst = min(left, key=losses.__getitem__)
                # A stand-in keeps the numbers of the others, by which some models choose their masks.
                layers[worst] = PassOn(trials.wrapping)
                left.remove(worst)
                trials.refresh()
                shown.update()
    finally:
        for index, block in enumerate(everything):
            layers[index] = block
    return [index for index in range(len(everything)) if index not in left]


def keep_blocks(model: nn.Module, name: str, layers: nn.ModuleList, kept: Sequence[int]) -> None:
    """Leave only the blocks `kept` of the list `name`, and let config and KV-cache numbers say so.

    Raises:
        PumiceError: the config counts other layers than the list has, or means blocks by their number.
    """
    config, total = config_of(model, name), len(layers)
    if config is None:
        # Nothing else remembers how many blocks there were.
        structure.drop_blocks(model, name, kept)
        return
    _check_config(model, config, name, total)
    changes = {key: _renumbered(value, kept, total) for key, value in _layer_lists(config)}
    config.num_hidden_layers = len(kept)
    for key, value in changes.items():
        setattr(config, key, value)
    blocks = [layers[index] for index in kept]
    for new, (old, block) in enumerate(zip(kept, blocks, strict=True)):
        for module in block.modules():
            # The KV cache is a list by this number.
            if module.__dict__.get("layer_idx") == old:
                module.layer_idx = new  # type: ignore[assignment]
    for index in range(total - 1, -1, -1):
        if index not in kept:
            del layers[index]


def config_of(model: nn.Module, name: str) -> Any:
    """The config of the innermost module around `name` that has one, or None."""
    path = name.split(".")
    for end in range(len(path), -1, -1):
        config = getattr(model.get_submodule(".".join(path[:end])), "config", None)
        if config is not None and hasattr(config, "num_hidden_layers"):
            return config
    return None


def _check_config(model: nn.Module, config: Any, name: str, total: int) -> None:
    if config.num_hidden_layers != total or getattr(config, "is_encoder_decoder", False):
        raise PumiceError(
            f"the config of {type(model).__name__} counts {config.num_hidden_layers} layers and {name} has {total}: "
            "depth pruning works on models of one stack of blocks."
        )
    for key in ("scale_attn_by_inverse_layer_idx", "num_kv_shared_layers", "cross_attention_layers"):
        if getattr(config, key, None):
            raise PumiceError(
                f"the config of {type(model).__name__} has {key}={getattr(config, key)!r}, which means blocks by their "
                "number: removing some would change the others. Use a method that removes width."
            )


def _layer_lists(config: Any) -> list[tuple[str, list[Any]]]:
    """Attributes of a config that say something of each layer, or name layers by number."""
    return [(key, value) for key, value in vars(config).items() if "layer" in key and isinstance(value, list) and value]


def _renumbered(value: list[Any], kept: Sequence[int], total: int) -> list[Any]:
    if len(value) == total:
        return [value[index] for index in kept]
    new = {old: index for index, old in enumerate(kept)}
    if all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < total for item in value):
        return [new[item] for item in value if item in new]
    return value


def _ranges(numbers: Sequence[int]) -> str:
    """`3, 7-9` of 3, 7, 8, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"
