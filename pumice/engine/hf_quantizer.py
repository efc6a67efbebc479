"""The quantizer class that Transformers calls to load a Pumice checkpoint; imported by the hook in `hf`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pumice.core import structure
from pumice.core.errors import PumiceError
from pumice.engine.files import check_file
from pumice.engine.store import check_version
from pumice.engine.writer import FORMAT_VERSION, join, restore_entry, weights_of
from pumice.weights.layouts.base import Packed, layout_named, shape_text, validate
from pumice.weights.modules import SparseModule, densify, reads_weight, replace_module, sparse_twin
from pumice.weights.wrapped import Substitute, wrap_around


class PumiceConfig(QuantizationConfigMixin):
    """The `quantization_config` of a Pumice checkpoint, as `engine.store` writes it.

    Raises:
        PumiceError: a format version newer than this Pumice.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        layers: Mapping[str, Any] | None = None,
        tied: Mapping[str, str] | None = None,
        wrapped: Mapping[str, Any] | None = None,
        files: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        structure: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        del others
        self.quant_method = "pumice"  # type: ignore[assignment]
        self.format_version = format_version
        self.layers, self.tied = dict(layers or {}), dict(tied or {})
        self.wrapped = dict(wrapped or {})
        self.files, self.metadata = dict(files or {}), dict(metadata or {})
        if structure:
            self.structure = dict(structure)
        check_version(self.__dict__, "this checkpoint")

    def __repr__(self) -> str:
        return f"PumiceConfig(format_version={self.format_version}, {len(self.layers)} sparse layers)"


class Expand(ConversionOps):
    """Loading operation: the tensors of one stored matrix become the dense parameter they stand for."""

    def __init__(self, names: Mapping[str, str], entry: Mapping[str, Any]) -> None:
        self.names, self.entry = dict(names), dict(entry)

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        del source_patterns, target_patterns
        name = kwargs["full_layer_name"]
        packed = Packed.empty(self.entry)
        # Transformers has cast the values already, to the dtype that it wants for this parameter.
        packed.fill(
            {self.names[key]: found[0] if isinstance(found, list) else found for key, found in input_dict.items()}
        )
        validate(packed, name)
        return {name: restore_entry(packed, self.entry)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise PumiceError("an expanded weight is not packed again by save_pretrained: use pumice.save(model, path).")


class PumiceHfQuantizer(HfQuantizer):
    """Swaps sparse modules into the empty model before its weights are read.

    Weights that no sparse module can hold (fused experts, 1-D convolutions), or that the model itself looks at in every
    call (T5's `wo`), are expanded while they are read.
    """

    # True would be refused by Transformers in words that name no remedy, before `validate_environment`.
    requires_calibration = False

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._expanded: dict[str, Mapping[str, Any]] = {}

    @property
    def stored(self) -> PumiceConfig:
        assert isinstance(self.quantization_config, PumiceConfig)
        return self.quantization_config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise PumiceError("quantization_config=PumiceConfig prunes nothing: use pumice.prune(model, ...) instead.")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for file in kwargs.get("checkpoint_files") or ():
            fact = self.stored.files.get(Path(file).name)
            if fact is not None:
                check_file(Path(file), fact)
        changed = getattr(self.stored, "structure", None)
        if changed:
            structure.rebuild(model, changed)
        modules = dict(model.named_modules())
        for key, entry in self.stored.wrapped.items():
            name = self._name_in(model, modules, key)
            if name in modules:
                replace_module(model, name, wrap_around(modules[name], entry, name))
        modules = dict(model.named_modules())
        for key, entry in self.stored.layers.items():
            name = self._name_in(model, modules, key)
            module = modules.get(name) if entry["kind"] != "tensor" else None
            twin = sparse_twin(module) if module is not None and not reads_weight(model, name) else None
            if module is None or twin is None:
                self._expanded[key] = entry
                continue
            weight = module.get_parameter("weight")
            if shape_text(weight.shape) != entry["weight"]:
                raise PumiceError(
                    f"{name}.weight is {entry['weight']} in the checkpoint and {shape_text(weight.shape)} by its config.json: "
                    f"they do not belong together."
                )
            empty = Packed.empty(entry).astype(weight.dtype)
            replace_module(model, name, twin.from_module(module, empty))
        return model

    @staticmethod
    def _name_in(model: Any, modules: Mapping[str, nn.Module], key: str) -> str:
        """The module's name here: a base model loaded from a checkpoint with a head has no prefix, and vice versa."""
        prefix = f"{model.base_model_prefix}."
        if key not in modules and key.startswith(prefix):
            return key.removeprefix(prefix)
        return key if key in modules or prefix + key not in modules else prefix + key

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """One converter per expanded weight, before the model's own, which know plain names only."""
        mine = []
        for key, entry in self._expanded.items():
            names = {f"^{re.escape(join(key, tensor))}$": tensor for tensor in entry["tensors"]}
            target = key if entry["kind"] == "tensor" else join(key, "weight")
            mine.append(WeightConverter(list(names), target, [Expand(names, entry)]))
        return mine + super().update_weight_conversions(weight_conversions, model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            if isinstance(module, SparseModule):
                # Transformers makes every floating-point tensor trainable.
                module.get_parameter(module.packed.value_name).requires_grad_(False)
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            model._weight_conversions = [each for each in conversions if not _expands(each)]
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dense = densify(model)
        return dense if dtype is None else dense.to(dtype)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """Called by save_pretrained before it writes the config, which has to describe the model as it is now."""
        layers, state = {}, None
        wrapped = {name: m.describe() for name, m in model.named_modules() if isinstance(m, Substitute)}
        for name, module in model.named_modules():
            if isinstance(module, SparseModule):
                held = module.packed
                stored = layout_named(held.layout).for_files(held)
                if stored is not held:
                    state = model.state_dict() if state is None else state
                    for tensor in held.tensors:
                        del state[join(name, tensor)]
                    state |= {join(name, key): tensor for key, tensor in stored.tensors.items()}
                for weight in weights_of(name, module):
                    layers[name] = weight.describe(stored)
        changed = structure.describe(model)
        config = PumiceConfig(layers=layers, wrapped=wrapped, metadata=self.stored.metadata, structure=changed)
        self.quantization_config = model.config.quantization_config = config
        return state, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _expands(conversion: Any) -> bool:
    return any(isinstance(operation, Expand) for operation in getattr(conversion, "operations", ()))


if "pumice" not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config("pumice")(PumiceConfig)
    register_quantizer("pumice")(PumiceHfQuantizer)
