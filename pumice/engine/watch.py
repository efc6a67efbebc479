"""Whether modules are still those that a plan was made from: their parts, weights, hooks and settings, asked at every call."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

CAPTURE = "transformers.utils.output_capturing"
"""Where the hooks of Transformers come from."""

_version: Callable[[Tensor], int] = Tensor._version.__get__  # pyright: ignore[reportAttributeAccessIssue]


class Watch:
    """What was seen of modules; `start` notes the numbers that their tensors have."""

    def __init__(self) -> None:
        self.places: list[tuple[dict[str, Any], str]] = []
        self.things: list[Any] = []
        self.hooks: list[dict[int, Any]] = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]

    def see(self, held: Mapping[str, Any], key: str, thing: Any) -> None:
        """`held[key]` is to stay `thing`; None: it is to stay away."""
        self.places.append((cast(dict[str, Any], held), key))
        self.things.append(thing)

    def see_all(self, held: Mapping[str, Any]) -> None:
        """All that is there now is to stay."""
        for key, thing in held.items():
            self.see(held, key, thing)

    def called(self, module: nn.Module, forward: Any = None) -> None:
        """See what would run if the module were called: its hooks, and the forward that a library puts in front of its own."""
        self.hooks += [module._forward_hooks, module._forward_pre_hooks]
        self.see(module.__dict__, "forward", forward)

    def start(self) -> None:
        self.tensors = [thing for thing in self.things if isinstance(thing, Tensor)]
        # `module.to` keeps the Parameter and gives it other memory. Inference tensors count no versions.
        self.counted = [tensor for tensor in self.tensors if not tensor.is_inference()]
        self.pointers, self.versions = self._state()

    def _state(self) -> tuple[list[int], list[int]]:
        # Loops of the interpreter would take a fortieth of a small model's token.
        return list(map(Tensor.data_ptr, self.tensors)), list(map(_version, self.counted))

    def stale(self) -> bool:
        """Whether anything that was seen is another thing now, or has other numbers."""
        same = all(map(operator.is_, itertools.starmap(dict.get, self.places), self.things))
        return not same or self._state() != (self.pointers, self.versions)

    def hooked(self) -> bool:
        """Whether somebody wants to be told when one of the modules is called."""
        # Those of Transformers stay once they were needed, and do nothing where no outputs of layers are asked for.
        return any(self.hooks) and any(
            getattr(hook, "__module__", "") != CAPTURE for hooks in self.hooks for hook in hooks.values()
        )
