"""What follows each convolution of a model, and may be fused into it: found by running the model once on an example.

Every operation of the run is seen, whoever makes it, and notes whose memory it reads. A batch norm or a ReLU may go into the
convolution before it only if it alone reads what stands between, views included, and if nobody still holds that when the run is
over.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pumice.core.calls import call_model, tensors
from pumice.core.errors import PumiceError
from pumice.core.stats import evaluating
from pumice.weights.modules import SparseConv2d

CLAMPS: dict[type[nn.Module], tuple[float, float]] = {nn.ReLU: (0.0, math.inf), nn.ReLU6: (0.0, 6.0)}
Memory = StorageWeakRef | None
"""What a tensor's numbers stand in."""


@dataclass
class Site:
    """A convolution of a model, the shape of what it was given, and what follows it and can be fused."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    norm: nn.Module | None = None
    activation: nn.Module | None = None

    @property
    def clamp(self) -> tuple[float, float]:
        return (-math.inf, math.inf) if self.activation is None else CLAMPS[type(self.activation)]


@dataclass
class _Seen:
    """One run: how often each module was called, what it was given and gave, and who read the memory of each tensor.

    Readers are modules that are looked at, or None for all the rest.
    """

    calls: dict[int, int] = field(default_factory=dict)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    inputs: dict[int, Memory] = field(default_factory=dict)
    outputs: dict[int, Memory] = field(default_factory=dict)
    readers: dict[Memory, list[nn.Module | None]] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)
    """Memory that is given back would be taken for what comes to stand there."""
    inside: int = 0

    def memory(self, tensor: Tensor) -> Memory:
        self.alive.append(tensor)
        # Weights in an order of oneDNN's own have no storage, and nobody else reads them.
        return None if tensor.layout is not torch.strided else StorageWeakRef(tensor.untyped_storage())

    def read(self, values: Any, by: nn.Module | None) -> None:
        for tensor in tensors(values):
            self.readers.setdefault(self.memory(tensor), []).append(by)

    def end(self) -> None:
        """Let go of everything: what lives on is held by somebody, who may read it."""
        self.alive.clear()
        gc.collect()
        for memory, found in self.readers.items():
            if memory is None or not memory.expired():
                found.append(None)

    def next(self, module: nn.Module) -> nn.Module | None:
        """The module that alone reads what this one gave, where both are called once."""
        output = self.outputs.get(id(module))
        if output is None or self.calls[id(module)] != 1:
            return None
        first, *others = self.readers.get(output, [None])
        # What changes its input in place is all that the later readers see.
        if first is None or self.calls[id(first)] != 1 or (others and self.outputs.get(id(first)) != output):
            return None
        return first

    def last_reader(self, module: nn.Module) -> bool:
        """Whether nothing else reads what the module was given after it."""
        given = self.inputs.get(id(module))
        return given is not None and self.calls[id(module)] == 1 and self.readers[given][-1] is module


class _Readers(TorchDispatchMode):
    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.seen.inside:
            self.seen.read([*args, *(kwargs or {}).values()], None)
        return func(*args, **(kwargs or {}))


def _is_convolution(module: nn.Module) -> bool:
    # Subclasses exist because they do something else.
    return type(module) in (nn.Conv2d, SparseConv2d) and cast(Any, module).padding_mode == "zeros"


@dataclass
class Found:
    """What one run of a model on an example showed."""

    sites: list[Site]
    activations: list[nn.Module]
    """Those that no convolution takes in, and that may overwrite their input."""
    pools: Sequence[tuple[nn.Module, tuple[int, ...]]]
    """Max poolings, and the shapes of what they were given."""


def look(model: nn.Module, example: Any) -> Found:
    """Every convolution that one run on `example` calls once, in the order of the modules, and what can be faster beside them.

    Raises:
        PumiceError: the model does not take the example.
    """
    seen = _Seen()
    named = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    wanted = {
        name: module
        for name, module in model.named_modules()
        if (_is_convolution(module) or type(module) in (nn.BatchNorm2d, nn.MaxPool2d, *CLAMPS))
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
    }

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen.inside:
            seen.read([*args, *kwargs.values()], module)
        seen.inside += 1

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.inside -= 1
        seen.calls[id(module)] = seen.calls.get(id(module), 0) + 1
        given = next(tensors([*args, *kwargs.values()]), None)
        if isinstance(output, Tensor) and given is not None:
            seen.inputs[id(module)], seen.outputs[id(module)] = seen.memory(given), seen.memory(output)
            seen.shapes[id(module)] = tuple(given.shape)

    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in wanted.values()]
    handles += [m.register_forward_hook(after, with_kwargs=True) for m in wanted.values()]
    try:
        with torch.no_grad(), evaluating(model), _Readers(seen):
            result = call_model(model, example)
        seen.end()
        del result
    except Exception as error:
        # What is raised depends on where the model first notices.
        first_line = str(error).partition("\n")[0]
        raise PumiceError(
            f"example={_text(example)} cannot be run through {type(model).__name__} ({type(error).__name__}: "
            f"{first_line}): give an input as the model takes it, images [N, C, H, W] for instance."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    sites = []
    for name, module in wanted.items():
        once = seen.calls.get(id(module)) == 1 and named[id(module)] == 1
        if not once or not _is_convolution(module) or len(seen.shapes.get(id(module), ())) != 4:
            continue
        site = Site(name, module, seen.shapes[id(module)])
        follower = seen.next(module)
        if type(follower) is nn.BatchNorm2d and follower.running_mean is not None:
            site.norm, follower = follower, seen.next(follower)
        site.activation = follower if type(follower) in CLAMPS else None
        sites.append(site)
    taken = {id(site.activation) for site in sites}
    rest = [m for m in wanted.values() if id(m) in seen.outputs and id(m) not in taken]
    activations = [m for m in rest if type(m) in CLAMPS and seen.last_reader(m)]
    pools = [(m, seen.shapes[id(m)]) for m in rest if type(m) is nn.MaxPool2d and len(seen.shapes[id(m)]) == 4]
    return Found(sites, activations, pools)


def _text(example: Any) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors(example)) or type(example).__name__
