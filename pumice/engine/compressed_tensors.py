"""Reader of the sparse checkpoints that llm-compressor and SparseML wrote: sparse-bitmask and sparse-24-bitmask.

Per weight the format holds `compressed` (the kept values, row by row), `bitmask` (one bit per position, packed along the
last axis, least significant first), `shape`, and, in sparse-bitmask, `row_offsets`. config.json names it in
`sparsity_config`, inside `quantization_config` or, in older files, `compression_config`. (compressed-tensors 0.9)

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.engine.writer import join
from pumice.weights.layouts.base import pack_smallest, unpack_bits
from pumice.weights.modules import reads_weight, replace_module, sparse_twin

FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
_PARTS = ("compressed", "bitmask", "shape", "row_offsets")
_CONFIGS = ("quantization_config", "compression_config")


def sparsity_format(config: Mapping[str, Any]) -> str | None:
    """The sparse format that a config.json names, or None where it names none that is read here."""
    for key in _CONFIGS:
        outer = config.get(key)
        if isinstance(outer, Mapping):
            inner = outer.get("sparsity_config") or outer
            if isinstance(inner, Mapping) and inner.get("format") in FORMATS:
                return str(inner["format"])
    inner = config.get("sparsity_config")
    return str(inner["format"]) if isinstance(inner, Mapping) and inner.get("format") in FORMATS else None


def read_tensors(path: str | Path) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, dense tensor and whether it was stored sparse, for every parameter of a checkpoint.

    Raises:
        PumiceError: no safetensors, a weight of which parts are missing or contradict each other, or one that is
            quantized as well.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(path)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise PumiceError(f"path={str(path)!r} holds no *.safetensors: check that the download is complete.")
    # A weight's parts may lie in different shards.
    parts: dict[str, dict[str, Tensor]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118
                    stem, _, last = name.rpartition(".")
                    if last in _PARTS:
                        parts.setdefault(stem, {})[last] = shard.get_tensor(name)
                        if _complete(parts[stem]):
                            yield join(stem.removesuffix(".weight"), "weight"), _expand(stem, parts.pop(stem)), True
                    else:
                        yield name, shard.get_tensor(name), False
        except SafetensorError as error:
            raise PumiceError(f"{file} cannot be read ({error}): copy or download it again.") from None
    rest = {stem: found for stem, found in parts.items() if set(found) != {"row_offsets"}}
    for stem, found in rest.items():
        lost = sorted({"compressed", "bitmask", "shape"} - set(found))
        raise PumiceError(f"weight {stem} in {path} lacks {', '.join(lost)}: copy or download the checkpoint again.")


def _complete(found: Mapping[str, Tensor]) -> bool:
    # The row offsets repeat what the bitmask says, so nobody waits for them.
    return {"compressed", "bitmask", "shape"} <= set(found)


def _expand(name: str, found: Mapping[str, Tensor]) -> Tensor:
    """The dense weight from its parts."""
    shape = [int(size) for size in found["shape"].flatten().tolist()]
    values, bits = found["compressed"].flatten(), found["bitmask"].view(torch.uint8)
    if values.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise PumiceError(
            f"weight {name} is sparse and quantized to {values.dtype}: only floating-point weights are read."
        )
    expected = [*shape[:-1], (shape[-1] + 7) // 8] if shape else []
    if not shape or list(bits.shape) != expected:
        raise PumiceError(
            f"weight {name} of shape {shape} has a bitmask {list(bits.shape)}: the checkpoint is damaged."
        )
    mask = unpack_bits(bits, shape[-1])
    if int(mask.sum()) != values.numel():
        raise PumiceError(
            f"weight {name} marks {int(mask.sum())} values and holds {values.numel()}: the checkpoint is damaged."
        )
    return torch.zeros(shape, dtype=values.dtype).masked_scatter(mask, values)


def load(path: str | Path, *, into: nn.Module | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Load an old sparse checkpoint as a model with sparse modules where it was sparse.

    Args:
        path: the folder.
        into: fill this module instead of building the architecture that config.json names.
        device: where the model goes.

    Raises:
        PumiceError: not such a checkpoint, damaged, quantized as well, or of an unknown architecture.
    """
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise PumiceError(f"path={str(path)!r} has no readable config.json ({error}): check the path.") from None
    if sparsity_format(config) is None:
        raise PumiceError(
            f"path={str(path)!r} is in none of the formats {', '.join(FORMATS)}: load it with Transformers."
        )
    dense, sparse = {}, []
    for name, tensor, was_sparse in read_tensors(path):
        dense[name] = tensor
        sparse += [name] if was_sparse else []
    model = _build(config, dense, str(path)) if into is None else _fill(into, dense, str(path))
    modules = dict(model.named_modules())
    for name in sparse:
        stem = name.removesuffix(".weight")
        module = modules.get(stem)
        twin = sparse_twin(module) if module is not None and not reads_weight(model, stem) else None
        if module is not None and twin is not None:
            weight = module.get_parameter("weight").detach()
            w_OI = weight.t() if type(module).__name__ == "Conv1D" else weight.flatten(1)
            packed = pack_smallest(w_OI)
            model = replace_module(model, stem, twin.from_module(module, packed))
    return model.to(device)


def _build(config: Mapping[str, Any], dense: dict[str, Tensor], where: str) -> nn.Module:
    import transformers

    plain = {
        key: value for key, value in copy.deepcopy(dict(config)).items() if key not in (*_CONFIGS, "sparsity_config")
    }
    names = plain.get("architectures") or ["none"]
    cls = getattr(transformers, str(names[0]), None)
    if cls is None:
        raise PumiceError(f"architecture {names[0]!r} of {where} is not in transformers {transformers.__version__}.")
    own = cls.config_class.from_dict(plain)
    first = next((t.dtype for t in dense.values() if t.is_floating_point()), torch.float32)
    model, info = cls.from_pretrained(None, config=own, state_dict=dense, dtype=first, output_loading_info=True)
    if info["missing_keys"]:
        raise PumiceError(f"checkpoint {where} lacks {', '.join(sorted(info['missing_keys'])[:3])}: download it again.")
    return model


def _fill(into: nn.Module, dense: dict[str, Tensor], where: str) -> nn.Module:
    try:
        into.load_state_dict(dense)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise PumiceError(f"checkpoint {where} does not fit into {type(into).__name__}: {reason}.") from None
    return into
