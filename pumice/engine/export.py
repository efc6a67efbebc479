"""Models for readers that know nothing of Pumice: Transformers checkpoints with zeros written out, and ONNX."""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core import structure
from pumice.core.errors import PumiceError
from pumice.engine.files import staged
from pumice.engine.store import save, save_companions
from pumice.engine.writer import join
from pumice.weights.modules import SparseModule, densify
from pumice.weights.wrapped import Substitute

FORMATS = ("dense", "onnx")


def export(
    model: nn.Module | str | Path,
    out: str | Path,
    format: str = "dense",
    overwrite: bool = False,
    *,
    tokenizer: Any = None,
    inputs: Mapping[str, Tensor] | tuple[Tensor, ...] | None = None,
) -> Path:
    """Write a model as an ordinary dense checkpoint or as ONNX; the zeros stay, the saved bytes do not.

    Args:
        model: a module, or anything that `load_model` takes (then its tokenizer is exported too).
        out: the folder to write; it appears complete or not at all.
        format: "dense" (Transformers' own `save_pretrained`; plain safetensors for other modules), or "onnx"
            (`model.onnx`, batch and sequence of any size for text models).
        overwrite: replace what is at `out`.
        inputs: example inputs for "onnx"; needed where they cannot be told from a Hugging Face config.

    Raises:
        PumiceError: unknown format, `out` exists, ONNX packages missing, inputs needed, or torch cannot export it.
    """
    if format not in FORMATS:
        raise PumiceError(f"format={format!r} is unknown: write one of {', '.join(FORMATS)}.")
    if not isinstance(model, nn.Module):
        from pumice.engine.models import load_model

        loaded = load_model(model)
        model, tokenizer = loaded.model, tokenizer or loaded.tokenizer
    if format == "onnx":
        return _onnx(model, Path(out), overwrite, tokenizer, inputs)
    if not hasattr(model, "save_pretrained"):
        return save(model, out, format="dense", overwrite=overwrite)
    if structure.describe(model) is not None:
        raise PumiceError(
            f"format='dense': the layers of this {type(model).__name__} have different widths or lack parts, which no config "
            "of Transformers can say: save it with format='pumice', which `import pumice` lets Transformers load."
        )
    with staged(out, overwrite) as folder:
        _bare(model).save_pretrained(folder, state_dict=dense_state(model))
        save_companions(folder, model, tokenizer)
    return Path(out)


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """`state_dict` with every stored matrix as the dense weight that it stands for."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, SparseModule):
            for tensor in module.packed.tensors:
                del state[join(name, tensor)]
            state[join(name, "weight")] = module.dense_weight().detach().contiguous()
    for name, module in model.named_modules():
        if isinstance(module, Substitute):
            inside = f"{name}." if name else ""
            state = {key: tensor for key, tensor in state.items() if not key.startswith(inside)}
            state |= {join(name, key): tensor for key, tensor in module.dense_tensors().items()}
    return state


def _bare(model: Any) -> Any:
    """The ordinary Transformers model of the same config, without memory: it knows how to save a state dict."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        bare = type(model)(config)
    # A meta model counts its dtype as the default one, and save_pretrained writes that into the config.
    dtype = next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.float32)
    bare = bare.to(dtype)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        bare.generation_config = generation
    return bare


class _Logits(nn.Module):
    """A Hugging Face model as a function of named inputs that returns its first output."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        named = dict(zip(self.names, values, strict=True))
        if getattr(getattr(self.model, "config", None), "use_cache", None):
            named["use_cache"] = False  # type: ignore[assignment]
        return self.model(**named, return_dict=False)[0]


def _onnx(
    model: nn.Module,
    out: Path,
    overwrite: bool,
    tokenizer: Any,
    inputs: Mapping[str, Tensor] | tuple[Tensor, ...] | None,
) -> Path:
    lost = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if lost:
        raise PumiceError(f"format='onnx' needs the packages {', '.join(lost)}: run pip install 'pumice[export]'.")
    dense = densify(copy.deepcopy(model)).eval().requires_grad_(False)
    given = inputs if inputs is not None else _example_inputs(dense)
    if isinstance(given, Mapping):
        wrapped, values = _Logits(dense, list(given)), tuple(given.values())
        names = list(given)
    else:
        wrapped, values, names = dense, tuple(given), [f"input_{index}" for index in range(len(given))]
    config: Any = getattr(dense, "config", None)
    if getattr(config, "_experts_implementation", None) is not None:
        # Grouped products have no ONNX form; all experts in one batch have.
        config._experts_implementation = "batched_mm"
    with staged(out, overwrite) as folder:
        _trace(wrapped, values, names).save(folder / "model.onnx")
        if hasattr(model, "config") and hasattr(model.config, "save_pretrained"):
            _bare(model).config.save_pretrained(folder)
        save_companions(folder, model, tokenizer)
    return out


def _trace(model: nn.Module, values: tuple[Tensor, ...], names: list[str]) -> Any:
    """The ONNX program of a module; PumiceError with the exporter's reason where there is none."""
    shapes = tuple(_dynamic(value) for value in values)
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                model,
                values,
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=["output"],
                dynamic_shapes=(shapes,) if isinstance(model, _Logits) else shapes,
            )
    except Exception as error:
        # The exporter raises a class per stage; all mean that this architecture has no ONNX form.
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join((str(cause).strip() or type(cause).__name__).splitlines()[0].split())
        name = type(model.model if isinstance(model, _Logits) else model).__name__
        raise PumiceError(f"format='onnx': torch cannot export {name} ({reason}): use format='dense'.") from error
    finally:
        log.setLevel(level)


def _dynamic(value: Tensor) -> dict[int, Any]:
    """Batch, and for token ids the sequence, may have any size; the sizes of images are fixed by the model."""
    free = {0: torch.export.Dim.DYNAMIC}
    if value.dim() == 2 and not value.is_floating_point():
        free[1] = torch.export.Dim.DYNAMIC
    return free


def _example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Example inputs of a Hugging Face model, told from its config."""
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise PumiceError("inputs are needed to export this module to ONNX: give inputs=(tensor, ...).")
    if main == "pixel_values" and getattr(config, "image_size", None):
        size = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
        return {main: torch.zeros(2, getattr(config, "num_channels", 3), *size, dtype=next(model.parameters()).dtype)}
    if main == "input_ids":
        ids = torch.arange(12).view(2, 6) % config.get_text_config().vocab_size
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {**inputs, "decoder_input_ids": ids[:, :4].clone()} if config.is_encoder_decoder else inputs
    raise PumiceError(f"inputs are needed to export {type(model).__name__}: give inputs={{{main!r}: tensor}}.")
