"""A model put back as it was when what changes its structure fails halfway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, list, set)


@contextmanager
def restored_on_failure(model: nn.Module) -> Iterator[None]:
    """Whatever is raised inside, the model is then what it was before: modules, tensors, attributes and config.

    All of them are the same objects again, tensors with the values (and the memory) that they had. A copy of every
    tensor is held until the end, so that it costs the model's bytes once more. Nothing is undone where nothing is raised.
    """
    tensors = [_Values(tensor) for tensor in _tensors(model)]
    seen: set[int] = set()
    objects = [state for module in model.modules() for state in _states(module, seen)]
    try:
        yield
    except BaseException:
        for state in objects:
            state.restore()
        for values in tensors:
            values.restore()
        raise


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, tied ones once."""
    found = [
        tensor for module in model.modules() for tensor in (*module._parameters.values(), *module._buffers.values())
    ]
    return list({id(tensor): tensor for tensor in found if tensor is not None}.values())


class _Values:
    """What one tensor holds."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.memory, self.grad = tensor, tensor.data, tensor.grad
        self.copy = tensor.detach().clone()
        self.requires_grad = tensor.requires_grad

    def restore(self) -> None:
        with torch.no_grad():
            self.memory.copy_(self.copy)
        self.tensor.data = self.memory
        self.tensor.requires_grad_(self.requires_grad)
        self.tensor.grad = self.grad


class _State:
    """The attributes of one object; containers among them are remembered one level deep."""

    def __init__(self, owner: Any) -> None:
        self.owner, self.attributes = owner, dict(vars(owner))
        self.contents = [(one, one.copy()) for one in self.attributes.values() if isinstance(one, _CONTAINERS)]

    def restore(self) -> None:
        vars(self.owner).clear()
        vars(self.owner).update(self.attributes)
        for container, content in self.contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


def _states(owner: Any, seen: set[int]) -> Iterator[_State]:
    """An object and the configs that it holds (of Hugging Face models), each once."""
    if id(owner) in seen:
        return
    seen.add(id(owner))
    state = _State(owner)
    yield state
    for value in state.attributes.values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _states(value, seen)
