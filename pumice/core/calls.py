"""Calls of a module: what goes in, which of it is the hidden state, and the same call again with another one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a block returned."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list | tuple):
        return output[0]
    if isinstance(output, Mapping):
        return next(iter(output.values()))
    raise PumiceError(f"a block returned {type(output).__name__}; only tensors, tuples and mappings can be followed.")


def like(output: Any, hidden: Tensor) -> Any:
    """`hidden` in the wrapping that the block's callers expect."""
    if isinstance(output, list | tuple):
        return (
            type(output)((hidden, *output[1:])) if type(output) in (list, tuple) else type(output)(hidden, *output[1:])
        )
    if isinstance(output, Mapping):
        wrapped = copy.copy(output)
        wrapped[next(iter(output))] = hidden  # type: ignore[index]
        return wrapped
    return hidden


def leaves(values: Any) -> Iterator[Any]:
    """Tensors and everything else that is no container, in order."""
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list | tuple):
        for value in values:
            yield from leaves(value)
    else:
        yield values


def tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in leaves(values) if isinstance(value, Tensor))


def same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal; objects that are neither tensors nor plain values count as equal."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    plain = (int, float, str, type(None))
    return a == b if isinstance(a, plain) or isinstance(b, plain) else True


def version(tensor: Tensor) -> int:
    """Counts the changes in place; -1 where torch does not count them."""
    return -1 if tensor.is_inference() else tensor._version


@dataclass
class CallRecord:
    """Arguments of one call of a unit; `hidden` stands in the place `where` (a position, a keyword, or nowhere)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    where: int | str | None

    def hidden(self) -> Tensor:
        if self.where is None:
            return torch.empty(0)
        return self.args[self.where] if isinstance(self.where, int) else self.kwargs[self.where]

    def with_hidden(self, hidden: Tensor | None) -> CallRecord:
        if isinstance(self.where, int):
            return CallRecord((*self.args[: self.where], hidden, *self.args[self.where + 1 :]), self.kwargs, self.where)
        if self.where is None:
            return self
        return CallRecord(self.args, {**self.kwargs, self.where: hidden}, self.where)

    def without_hidden(self) -> CallRecord:
        return self.with_hidden(None)

    def call(self, module: nn.Module, hidden: Tensor) -> Any:
        whole = self.with_hidden(hidden)
        return module(*whole.args, **whole.kwargs)


def record_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallRecord:
    position = next((index for index, value in enumerate(args) if isinstance(value, Tensor)), None)
    keyword = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
    return CallRecord(args, dict(kwargs), keyword if position is None else position)


def call_model(model: nn.Module, batch: Any) -> Any:
    """One forward pass: mappings as keywords (without labels), tuples as positions, a tensor alone."""
    config = getattr(model, "config", None)
    configs = (config, getattr(config, "text_config", None))
    # A cache would grow by every replay of a block.
    more = {"use_cache": False} if any(getattr(c, "use_cache", None) for c in configs) else {}
    if isinstance(batch, Mapping):
        return model(**{**more, **{key: value for key, value in batch.items() if key != "labels"}})
    if isinstance(batch, list | tuple):
        return model(*batch, **more)
    return model(batch, **more)


def token_mask(batch: Any) -> Tensor | None:
    """The padding mask of a batch, when it has one that masks something."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()) else None
