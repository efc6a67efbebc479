"""Models saved in the smallest layouts and loaded again: safetensors beside a config.json, never pickle.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core import structure
from pumice.core.errors import PumiceError
from pumice.engine import compressed_tensors
from pumice.engine.files import check_file
from pumice.engine.writer import FORMAT_VERSION, INDEX, Writer, join, restore_entry
from pumice.weights.layouts.base import Packed, dtype_name, shape_text, validate
from pumice.weights.modules import SparseModule, densify, reads_weight, replace_module, sparse_twin
from pumice.weights.patterns.base import Pattern, parse
from pumice.weights.wrapped import wrap_around

__all__ = ["Writer", "load", "model_config", "read_config", "save", "tied_parameters"]


def save(
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "pumice",
    overwrite: bool = False,
    tokenizer: Any = None,
    metadata: Mapping[str, Any] | None = None,
    hint: Pattern | str | None = None,
) -> Path:
    """Save a model with every weight in its smallest layout, dense included.

    What is stored depends on the weights alone, not on how `pack` runs them here. Hugging Face models also get their
    config and generation config, so that `from_pretrained` reads the folder. Tied weights are stored once, plainly.
    The folder appears complete or not at all.

    Args:
        model: any module.
        path: the folder to write.
        format: "pumice", or "dense" for a checkpoint with zeros written out that any Transformers reads.
        overwrite: replace what is at `path`.
        tokenizer: anything with `save_pretrained`, saved along.
        metadata: JSON kept with the checkpoint (method, density, ...).
        hint: the pattern that the weights were pruned to.

    Raises:
        PumiceError: unknown format, `path` exists, the disk is full, or a tensor has no place in safetensors.
    """
    if format not in ("pumice", "dense"):
        raise PumiceError(f"format={format!r} is unknown: write pumice or dense.")
    if format == "dense" and hasattr(model, "save_pretrained"):
        from pumice.engine.export import export

        return export(model, path, format="dense", overwrite=overwrite, tokenizer=tokenizer)
    pattern = parse(hint) if hint is not None else None
    # A folder that `save` left unfinished is worth nothing; one of a pruning run, which has a journal, is refused.
    with Writer(path, overwrite, dense=format == "dense", hint=pattern, tied=tied_parameters(model)) as writer:
        writer.add_module("", model)
        with writer.guarded("the tokenizer"):
            save_companions(writer.partial, model, tokenizer)
        return writer.finish(model_config(model), metadata=metadata, structure=structure.describe(model))


def save_companions(folder: Path, model: nn.Module, tokenizer: Any) -> None:
    """Generation config and tokenizer beside a checkpoint, where there are any; OSError where they cannot be written."""
    generation = getattr(model, "generation_config", None)
    if generation is not None and hasattr(generation, "save_pretrained"):
        generation.save_pretrained(folder)
    if tokenizer is None:
        return
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # The tokenizers library raises bare Exception where the system refuses to write.
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Every further name of a parameter that has several -> its first name."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def model_config(model: nn.Module) -> dict[str, Any]:
    """config.json of a Hugging Face model, without any quantization; empty for other modules."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return {}
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.dtype = dtype_name(next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32))
    return json.loads(config.to_json_string(use_diff=True))


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a Pumice checkpoint.

    Raises:
        PumiceError: no folder, no config.json, not one of Pumice's, or of a newer format version.
    """
    config = _any_config(path)
    stored = config.get("quantization_config")
    if not isinstance(stored, dict) or stored.get("quant_method") != "pumice":
        raise PumiceError(
            f"path={str(path)!r} is not a Pumice checkpoint (no quant_method pumice in its config.json): load it with "
            f"Transformers."
        )
    check_version(stored, str(path))
    return config


def _any_config(path: str | Path) -> dict[str, Any]:
    folder = Path(path)
    if not folder.is_dir():
        unfinished = folder.with_name(folder.name + ".partial").is_dir()
        hint = "an unfinished run lies beside it: continue it with --resume" if unfinished else "check the path"
        raise PumiceError(f"path={str(path)!r} is no folder: {hint}.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PumiceError(f"path={str(path)!r} has no config.json: it is not a Pumice checkpoint.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PumiceError(f"{folder / 'config.json'} is damaged ({error}): copy or download it again.") from None
    if not isinstance(config, dict):
        raise PumiceError(f"{folder / 'config.json'} is damaged (no JSON object): copy or download it again.")
    return config


def check_version(stored: Mapping[str, Any], where: str) -> None:
    """PumiceError if a checkpoint was written by a newer Pumice."""
    version = stored.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise PumiceError(
            f"{where} has format_version {version!r} and this Pumice reads up to {FORMAT_VERSION}: upgrade pumice."
        )


def check_files(folder: Path, stored: Mapping[str, Any]) -> None:
    """PumiceError if a file of the checkpoint is missing or not as it was written."""
    for file, fact in stored.get("files", {}).items():
        check_file(folder / file, fact)


def load(path: str | Path, *, into: nn.Module | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Load what `save` wrote, or an old compressed-tensors checkpoint in one of its sparse formats.

    Args:
        path: the folder.
        into: a module of the same architecture to fill (as it was before any units were removed from it): its `Linear`, `Conv2d` and `Conv1D` are replaced by sparse
            modules where stored sparse, in place. Needed for modules that are not Hugging Face's.
        device: where the model goes.

    Returns:
        The model (`into` itself, unless `into` is a single layer that was replaced).

    Raises:
        PumiceError: not a Pumice checkpoint, a newer format version, a missing, cut off or damaged file, or (with
            `into`) tensors that are missing, left over or of another shape.
    """
    if compressed_tensors.sparsity_format(_any_config(path)) is not None:
        return compressed_tensors.load(path, into=into, device=device)
    config = read_config(path)
    if into is None:
        return _load_transformers(Path(path), config, device)
    stored = config["quantization_config"]
    check_files(Path(path), stored)
    return _fill(into, _read_tensors(Path(path)), stored, str(path)).to(device)


def _load_transformers(folder: Path, config: Mapping[str, Any], device: str | torch.device) -> nn.Module:
    names = config.get("architectures")
    if not names:
        raise PumiceError(
            f"path={str(folder)!r} holds a module that is not Hugging Face's: give into=module, built as it was."
        )
    import transformers

    from pumice.engine.hf import install_hook

    install_hook()
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise PumiceError(
            f"architecture {names[0]!r} is not in transformers {transformers.__version__}: give into=module."
        )
    return cls.from_pretrained(folder, dtype="auto").to(device)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        where = json.loads((folder / INDEX).read_text())["weight_map"]
    except FileNotFoundError:
        where = dict.fromkeys(["model.safetensors"], "model.safetensors")
    tensors = {}
    for file in dict.fromkeys(where.values()):
        try:
            with safe_open(folder / file, framework="pt") as shard:
                tensors.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
        except (SafetensorError, FileNotFoundError) as error:
            raise PumiceError(f"{folder / file} cannot be read ({error}): copy or download it again.") from None
    return tensors


def take_packed(tensors: dict[str, Tensor], key: str, entry: Mapping[str, Any], where: str) -> Packed:
    """Remove the tensors of one stored matrix from `tensors` and check that they belong together."""
    packed = Packed.empty(entry)
    for name in packed.tensors:
        full = join(key, name)
        if full not in tensors:
            raise PumiceError(f"checkpoint {where} lacks tensor {full!r}: copy or download it again.")
    packed.fill({name: tensors.pop(join(key, name)) for name in packed.tensors})
    validate(packed, key or "the weight")
    return packed


def _fill(model: nn.Module, tensors: dict[str, Tensor], stored: Mapping[str, Any], where: str) -> nn.Module:
    """Put stored tensors into a module of ordinary layers."""
    model = densify(model)
    if stored.get("structure"):
        structure.rebuild(model, stored["structure"])
    for name, entry in stored.get("wrapped", {}).items():
        module = dict(model.named_modules()).get(name)
        if module is None:
            raise PumiceError(f"checkpoint {where} holds a wrapped layer {name}: into is another model.")
        model = replace_module(model, name, wrap_around(module, entry, name))
    modules = dict(model.named_modules())
    for key, entry in stored["layers"].items():
        packed = take_packed(tensors, key, entry, where)
        module = modules.get(key) if entry["kind"] != "tensor" else None
        twin = sparse_twin(module) if module is not None and not reads_weight(model, key) else None
        if module is None or twin is None:
            # No sparse module can stand here, so the weight is written out.
            name = key if entry["kind"] == "tensor" else join(key, "weight")
            tensors[name] = restore_entry(packed, entry)
            continue
        weight = module.get_parameter("weight")
        if shape_text(weight.shape) != entry["weight"]:
            raise PumiceError(
                f"{join(key, 'weight')} is {entry['weight']} in {where} and {shape_text(weight.shape)} in into: it was "
                f"built for another model."
            )
        model = replace_module(model, key, twin.from_module(module, packed.astype(weight.dtype)))
    targets = {**dict(model.named_parameters(remove_duplicate=False)), **_persistent_buffers(model)}
    filled = {id(t) for m in model.modules() if isinstance(m, SparseModule) for t in m.packed.tensors.values()}
    for alias, name in stored.get("tied", {}).items():
        if name in tensors and alias in targets:
            tensors[alias] = tensors[name]
    for name, target in targets.items():
        if id(target) in filled:
            continue
        if name in tensors:
            same = [other for other, tensor in targets.items() if tensor is target] if target.is_meta else []
            _copy(model, name, target, tensors[name], where, same)
            filled.add(id(target))
    missing = [name for name, target in targets.items() if id(target) not in filled]
    left = sorted(set(tensors) - set(targets))
    for what, names in (("lacks", missing), ("holds unknown", left)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise PumiceError(f"checkpoint {where} {what} {', '.join(names[:3])}{more}: into is another model.")
    return model


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        join(prefix, name): buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _copy(model: nn.Module, name: str, target: Tensor, source: Tensor, where: str, names: list[str]) -> None:
    """Fill `target` in place; one without memory is replaced, under all its names."""
    if target.shape != source.shape:
        raise PumiceError(
            f"{name} is {list(source.shape)} in {where} and {list(target.shape)} in into: it was built for another model."
        )
    if target.is_meta:
        source = source.to(target.dtype)
        new = nn.Parameter(source, target.requires_grad) if isinstance(target, nn.Parameter) else source
        for each in names:
            prefix, _, leaf = each.rpartition(".")
            setattr(model.get_submodule(prefix), leaf, new)
        return
    with torch.no_grad():
        target.copy_(source)
