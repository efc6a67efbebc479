"""A model whose weights stay on disk: blocks are read when their turn comes and forgotten afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.stream import InMemory
from pumice.engine.models import class_for, clear_errors, gguf_file, locate, quiet, read_json, weight_files
from pumice.engine.store import take_packed
from pumice.engine.writer import Writer, join, restore_entry


class Shards:
    """Random access to the tensors of a checkpoint folder, without reading a file as a whole.

    One file is open at a time: a mapped file counts as the process's own memory where that is limited, until the last
    tensor taken from it is gone.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self.where: dict[str, str] = json.loads(index.read_text())["weight_map"]
        else:
            self.where = {}
            for file in sorted(folder.glob("*.safetensors")):
                with safe_open(file, framework="pt") as opened:
                    self.where.update(dict.fromkeys(opened.keys(), file.name))
        self.folder = folder
        self._open: tuple[str, Any] | None = None

    def get(self, name: str) -> Tensor:
        """One tensor by its name in the checkpoint."""
        file = self.where[name]
        if self._open is None or self._open[0] != file:
            self.close()
            self._open = (file, safe_open(self.folder / file, framework="pt"))
        return self._open[1].get_tensor(name)

    def close(self) -> None:
        self._open = None


def parameters_of(writer: Writer, name: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under module `name` as an unfinished checkpoint holds them, expanded."""
    inside = {key for key in writer.where if key.startswith(f"{name}.")}
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(writer.partial / file, framework="pt"))
            for file in {writer.where[key] for key in inside}
        }
        tensors = {key: files[writer.where[key]].get_tensor(key) for key in inside}
    for key, entry in writer.layers.items():
        if key.startswith(f"{name}.") or key == name:
            packed = take_packed(tensors, key, entry, str(writer.partial))
            yield key if entry["kind"] == "tensor" else f"{key}.weight", restore_entry(packed, entry)
    yield from tensors.items()


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer by its full name: in place where it has memory, else replaced, aliases included."""
    module = model.get_submodule(name.rpartition(".")[0])
    key = name.rpartition(".")[2]
    old = getattr(module, key)
    if old.shape != tensor.shape:
        raise PumiceError(f"tensor {name} is stored as {tuple(tensor.shape)} but the model has {tuple(old.shape)}.")
    if not old.is_meta:
        old.detach().copy_(tensor)
        return
    new: Any = tensor.to(old.dtype)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for owner in model.modules():
        for table in (owner._parameters, owner._buffers):
            for alias, value in table.items():
                if value is old:
                    table[alias] = new


class DiskSource:
    """Loads units of a model on the meta device from a checkpoint, or from what the writer has finished."""

    def __init__(self, model: nn.Module, shards: Shards, names: dict[str, str], writer: Writer) -> None:
        self.model, self.shards, self.names, self.writer = model, shards, names, writer

    def load(self, name: str, module: nn.Module, original: bool = False) -> None:
        """Bring a unit's tensors into memory."""
        finished = dict(parameters_of(self.writer, name)) if name in self.writer.done and not original else {}
        buffers = {key for key, _ in module.named_buffers()}
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            full = join(name, key)
            # Buffers keep their memory (few bytes, some not in the checkpoint), but hold nothing true before this.
            if full in self.names and (tensor.is_meta or key in buffers or full in finished):
                put(self.model, full, finished[full] if full in finished else self.shards.get(self.names[full]))

    def free(self, name: str, module: nn.Module) -> None:
        """Forget a unit's tensors; whatever changed in them must have been written."""
        for owner in module.modules():
            for key, parameter in owner._parameters.items():
                if parameter is not None:
                    owner._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


class Unfinished(InMemory):
    """A model in memory of which an interrupted run had finished some units: they are put in where they are asked for."""

    def __init__(self, model: nn.Module, writer: Writer) -> None:
        self.model, self.writer = model, writer
        self.waiting = set(writer.done)

    def load(self, name: str, module: nn.Module, original: bool = False) -> None:
        del module
        if name in self.waiting and not original:
            self.waiting.remove(name)
            for key, tensor in parameters_of(self.writer, name):
                put(self.model, key, tensor)


def names_in_checkpoint(model: nn.Module, stored: set[str]) -> dict[str, str] | str:
    """Parameter name -> name in the checkpoint, or the reason why the two do not correspond one to one."""
    prefix = getattr(model, "base_model_prefix", "")
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    names: dict[str, str] = {}
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        short = name.removeprefix(f"{prefix}.")
        found = next((n for n in (name, short, join(prefix, name)) if n in stored), None)
        if found is not None:
            names[name] = found
        elif name not in tied and name not in dict(model.named_buffers()):
            return f"the checkpoint does not hold {name} under that name (Transformers converts it while loading)"
    return names


def empty_model(name: str | Path) -> tuple[nn.Module, str | None]:
    """A model by name, without memory for its weights, and the reason why they cannot be streamed from disk, if any.

    Raises:
        PumiceError: there is no such model, or its architecture is unknown.
    """
    import transformers
    from accelerate import init_empty_weights

    path = locate(name)
    gguf = gguf_file(path)
    with quiet(), clear_errors(str(name), path):
        if gguf is not None:
            config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
            cls: Any = transformers.AutoModelForCausalLM
            dtype = torch.bfloat16
        else:
            raw = read_json(path / "config.json", str(name))
            raw.pop("quantization_config", None)
            cls = class_for(raw, str(name), None)[1]
            config = transformers.AutoConfig.from_pretrained(path)
            dtype = config.dtype or torch.float32
        make = getattr(cls, "from_config", None) or cls._from_config
        with init_empty_weights(include_buffers=False):
            model = make(config, dtype=dtype)
    model.tie_weights()
    return model.eval(), "a GGUF file is expanded as a whole" if gguf is not None else _not_streamable(path)


def _not_streamable(path: Path) -> str | None:
    if read_json(path / "config.json", str(path)).get("quantization_config"):
        return "its weights are stored quantised or sparse"
    return None if list(path.glob("*.safetensors")) else "it has no safetensors files"


def open_on_disk(name: str | Path) -> tuple[nn.Module, Shards, dict[str, str], Path] | str:
    """A Hugging Face checkpoint as a model without memory, or the reason why it must be loaded whole.

    Everything that is not inside a block (embeddings, final norm, head) is read by the caller with `load_rest`.
    """
    path = locate(name)
    if gguf_file(path) is not None:
        return "a GGUF file is expanded as a whole"
    weight_files(path, str(name))
    model, reason = empty_model(name)
    if reason is not None:
        return reason
    shards = Shards(path)
    names = names_in_checkpoint(model, set(shards.where))
    if isinstance(names, str):
        shards.close()
        return names
    return model, shards, names, path


def load_rest(model: nn.Module, shards: Shards, names: dict[str, str], units: set[str]) -> None:
    """Read everything outside the units, which stays in memory."""
    for name in [n for n, _ in (*model.named_parameters(), *model.named_buffers())]:
        if name in names and not any(name.startswith(f"{unit}.") for unit in units):
            put(model, name, shards.get(names[name]))
