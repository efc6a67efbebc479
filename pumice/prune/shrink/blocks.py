"""The repeated blocks of a transformer: where they are, what they are made of, what they do to the residual stream.

Shapes: B batch, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.calls import call_model, hidden_of, record_of, token_mask
from pumice.core.errors import PumiceError
from pumice.core.precision import products
from pumice.core.progress import bar
from pumice.core.stats import evaluating
from pumice.prune.shrink.base import Job

PROBE = Job(1.0, progress=False)
"""How one batch is run to see what a model is made of."""


@dataclass(frozen=True)
class Parts:
    """Names of a pre-norm block's children: x + attention(norm_1(x)), then that + ffn(norm_2(that))."""

    norm_1: str
    attention: str
    norm_2: str
    ffn: tuple[str, ...]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of blocks with the most parameters, and its name.

    Raises:
        PumiceError: the model has no `nn.ModuleList`.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [(name, module) for name, module in lists if len(module) > 0]
    if not lists:
        raise PumiceError(
            f"{type(model).__name__} has no list of blocks (nn.ModuleList), and this method works on one: take a method that removes channels."
        )
    # Of nested lists the outer one, which comes first, has at least as many parameters.
    return max(lists, key=lambda item: size(item[1]))


def size(module: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def sample(job: Job, count: int) -> list[Any]:
    """The first batches of the job that hold `count` samples together (fewer where there are not so many).

    Raises:
        PumiceError: the job has no batches, or `count` is not positive.
    """
    if count < 1:
        raise PumiceError(f"samples={count} must be at least 1.")
    if not job.batches:
        raise PumiceError("data=None: this method measures on calibration data; pass data=….")
    taken: list[Any] = []
    for batch in job.batches:
        if count <= 0:
            break
        taken.append(batch)
        count -= rows(batch)
    return taken


def first(batch: Any) -> Any:
    """The first sample of a batch, without labels."""
    if isinstance(batch, Mapping):
        return {key: first(value) for key, value in batch.items() if key != "labels"}
    if isinstance(batch, list | tuple):
        return type(batch)(first(value) for value in batch)
    return batch[:1] if isinstance(batch, Tensor) and batch.dim() else batch


def rows(batch: Any) -> int:
    """Samples in a batch."""
    values = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, list | tuple) else [batch]
    return next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 1)


@contextmanager
def watching(
    modules: Sequence[nn.Module], see: Callable[[int, tuple[Any, ...], dict[str, Any], Any], None]
) -> Iterator[None]:
    """Call `see(index, args, kwargs, output)` behind every call of one of the modules."""

    def hook(index: int) -> Callable[..., None]:
        return lambda module, args, kwargs, output: see(index, args, kwargs, output)

    handles = [module.register_forward_hook(hook(i), with_kwargs=True) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def passes(
    model: nn.Module, batches: Sequence[Any], what: str, job: Job, before: Callable[[Any], None] = lambda batch: None
) -> Iterator[Any]:
    """Run the batches through the model in eval mode, without gradients; yields each after its pass.

    `before` is called with each batch before its pass; of the job only `progress` and `compute` count.
    """
    device = next((p.device.type for p in model.parameters()), "cpu")
    with torch.no_grad(), evaluating(model), bar(len(batches), what, enabled=job.progress, unit="batch") as shown:
        for batch in batches:
            before(batch)
            with products(device, job.compute):
                call_model(model, batch)
            shown.update()
            yield batch


def similarities(
    model: nn.Module,
    layers: nn.ModuleList,
    batches: Sequence[Any],
    measure: Callable[[Tensor], Tensor],
    job: Job,
) -> list[float]:
    """Mean over tokens of `measure(cos(x_in, x_out))` for every block; padding is left out.

    Raises:
        PumiceError: a block's output has another shape than its input.
    """
    sums, counts = [0.0] * len(layers), [0] * len(layers)
    found: list[tuple[int, Tensor]] = []

    def see(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x, y = record_of(args, kwargs).hidden(), hidden_of(output)
        if x.shape != y.shape:
            raise PumiceError(f"block {index} turns {tuple(x.shape)} into {tuple(y.shape)}: it cannot be skipped.")
        found.append((index, F.cosine_similarity(x.double(), y.double(), dim=-1)))

    with watching(list(layers), see):
        for batch in passes(model, batches, "block influence", job):
            mask = token_mask(batch)
            for index, cosine in found:
                kept = cosine[mask.bool()] if mask is not None and mask.shape == cosine.shape else cosine.flatten()
                sums[index] += float(measure(kept.clamp(-1, 1)).sum())
                counts[index] += kept.numel()
            found.clear()
    return [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]


def _is_norm(module: nn.Module) -> bool:
    own = [parameter.dim() for parameter in module.parameters()]
    return bool(own) and max(own) == 1 and not any(True for _ in module.children())


def find_parts(model: nn.Module, layers: nn.ModuleList, batch: Any) -> list[Parts]:
    """The parts of every block, from the order in which one pass runs its children.

    Raises:
        PumiceError: a block is not norm, attention, norm, FFN in this order (naming what it is).
    """
    children = [(i, name, child) for i, block in enumerate(layers) for name, child in block.named_children()]
    order: list[list[str]] = [[] for _ in layers]

    def see(index: int, *rest: Any) -> None:
        order[children[index][0]].append(children[index][1])

    with watching([child for _, _, child in children], see):
        for _ in passes(model, [batch], "probe", PROBE):
            pass
    return [_parts_of(block, names) for block, names in zip(layers, order, strict=True)]


def _parts_of(block: nn.Module, names: list[str]) -> Parts:
    norms = [i for i, name in enumerate(names) if _is_norm(block.get_submodule(name))]
    if norms != [0, 2] or len(names) < 4 or len(set(names)) != len(names):
        raise PumiceError(
            f"{type(block).__name__} runs {', '.join(names) or 'nothing'}: only blocks of norm, attention, norm, FFN "
            "with two residual connections can be taken apart."
        )
    return Parts(names[0], names[1], names[2], tuple(names[3:]))
