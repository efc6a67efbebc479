"""What was done to the structure of a model, so that a stored checkpoint can rebuild it from the original architecture.

A model whose layers have different widths, or lack a part, has no ordinary config. Its changes are kept on the model as
JSON steps, in order, and are repeated on a freshly built one: `set` (an attribute of a module), `drop` (blocks of a
module list), `replace` (a module by one of Pumice's own). The shapes of all tensors come last.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError

_KEY = "_pumice_structure"


def steps(model: nn.Module) -> list[dict[str, Any]]:
    """The steps noted so far; empty for a model as it was built."""
    return model.__dict__.setdefault(_KEY, [])


def changed(model: nn.Module) -> bool:
    """Whether anything was noted."""
    return bool(model.__dict__.get(_KEY))


def forget(model: nn.Module) -> None:
    """The model is an ordinary one of its config: nothing has to be repeated."""
    model.__dict__.pop(_KEY, None)


def set_attribute(model: nn.Module, path: str, name: str, value: Any) -> None:
    """Set an attribute of a module (a number of heads, a width) and note it."""
    setattr(model.get_submodule(path), name, value)
    steps(model).append({"do": "set", "module": path, "name": name, "value": value})


def note_shapes(model: nn.Module) -> None:
    """Tensors have changed their shapes."""
    if not steps(model):
        steps(model).append({"do": "shapes"})


def drop_blocks(model: nn.Module, path: str, keep: Sequence[int]) -> None:
    """Keep only these blocks of the module list at `path`; layer indices that blocks know of themselves follow."""
    blocks = model.get_submodule(path)
    if not isinstance(blocks, nn.ModuleList) or not keep:
        raise PumiceError(f"{path!r} must be a plain list of blocks, and at least one must stay.")
    kept = [blocks[index] for index in keep]
    for index in reversed(range(len(blocks))):
        del blocks[index]
    blocks.extend(kept)
    for index, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]
    steps(model).append({"do": "drop", "module": path, "keep": list(keep)})


def replace(model: nn.Module, path: str, cls: Any, **arguments: Any) -> nn.Module:
    """Put `cls.build(old, **arguments)` in the place of the module at `path`; the arguments must be JSON.

    `cls` must be a module of Pumice with that class method; its parameters are stored like any others.
    """
    parent, _, leaf = path.rpartition(".")
    new = cls.build(model.get_submodule(path), **arguments)
    setattr(model.get_submodule(parent), leaf, new)
    name = f"{cls.__module__}:{cls.__qualname__}"
    steps(model).append({"do": "replace", "module": path, "class": name, "arguments": arguments})
    return new


def describe(model: nn.Module) -> dict[str, Any] | None:
    """JSON for `rebuild`, or None where nothing was noted."""
    if not changed(model):
        return None
    done = [step for step in steps(model) if step["do"] != "shapes"]
    shapes = {name: list(tensor.shape) for name, tensor in _tensors(model).items()}
    return {"steps": done, "shapes": shapes}


def rebuild(model: nn.Module, stored: Mapping[str, Any]) -> None:
    """Repeat on a freshly built model what was done to the stored one; new tensors are empty.

    Raises:
        PumiceError: a step names something that this model or this Pumice does not have.
    """
    for step in stored["steps"]:
        try:
            _repeat(model, step)
        except (AttributeError, ImportError, IndexError, KeyError, TypeError) as error:
            raise PumiceError(
                f"the stored structure does not fit {type(model).__name__} ({step}: {error}): it was made of another "
                "model, or by a newer Pumice."
            ) from error
    _reshape(model, stored["shapes"])
    note_shapes(model)


def _repeat(model: nn.Module, step: Mapping[str, Any]) -> None:
    if step["do"] == "set":
        set_attribute(model, step["module"], step["name"], step["value"])
    elif step["do"] == "drop":
        drop_blocks(model, step["module"], step["keep"])
    elif step["do"] == "replace":
        module, _, name = step["class"].partition(":")
        # A checkpoint must not be able to name any code but Pumice's own modules.
        cls = getattr(importlib.import_module(module), name) if module.startswith("pumice.") else None
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise PumiceError(f"the stored structure names {step['class']!r}, which is no module of Pumice.")
        replace(model, step["module"], cls, **step["arguments"])
    else:
        raise KeyError(step["do"])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _reshape(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    tensors = _tensors(model)
    like = next(iter(tensors.values()), torch.empty(0))
    for name, shape in shapes.items():
        old = tensors.get(name)
        if old is None:
            prefix, _, leaf = name.rpartition(".")
            made = nn.Parameter(torch.empty(*shape, dtype=like.dtype, device=like.device), like.requires_grad)
            model.get_submodule(prefix).register_parameter(leaf, made)
        elif list(old.shape) != list(shape):
            resize(old, torch.empty(*shape, dtype=old.dtype, device=old.device))
    for name in tensors.keys() - shapes.keys():
        prefix, _, leaf = name.rpartition(".")
        owner = model.get_submodule(prefix)
        if leaf in owner._parameters:
            owner.register_parameter(leaf, None)
    for module in model.modules():
        refresh(module)


def resize(tensor: Tensor, new: Tensor) -> None:
    """Give a parameter or buffer other values of another shape; everything that holds it sees them."""
    tensor.grad = None
    tensor.data = new


def refresh(module: nn.Module) -> None:
    """Make the sizes that an ordinary layer states agree with its tensors."""
    weight = module._parameters.get("weight")
    if weight is None:
        return
    shape = weight.shape
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        if module.groups > 1:
            # Whole groups leave a grouped convolution.
            module.groups = module.groups * shape[0] // max(module.out_channels, 1)
        module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
    elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d):
        if module.groups > 1:
            module.groups = module.groups * shape[0] // max(module.in_channels, 1)
        module.in_channels, module.out_channels = shape[0], shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(shape)
    elif isinstance(module, nn.GroupNorm):
        if module.num_groups > 1:
            module.num_groups = max(1, module.num_groups * shape[0] // module.num_channels)
        module.num_channels = shape[0]
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        module.nx, module.nf = shape  # type: ignore[assignment]
