"""Whether a model that became smaller is still an ordinary Transformers architecture, and the config that says so."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import nn

from pumice.core import structure

WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
BIASES = ("mlp_bias", "attention_bias")

Shapes = dict[str, tuple[int, ...]]


def settle(model: nn.Module) -> bool:
    """Update the config of a Hugging Face model to what it has become; true if the config then tells everything.

    Where all layers have the same widths, a config with another `intermediate_size`, number of heads or of layers
    builds exactly this model, so that its checkpoint needs no Pumice. Biases that only some of the layers have got are
    joined by zeros where the architecture has them all or none.
    """
    if structure.describe(model) is None:
        return True
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        return False
    if any(step["do"] == "replace" for step in structure.steps(model)):
        return False
    actual = _shapes(model)
    for changes in _candidates(model, actual):
        config = copy.deepcopy(model.config)
        _change(config, changes)
        expected = _expected(model, config)
        if expected is None or not _fits(expected, actual):
            continue
        for name in expected.keys() - actual.keys():
            _zero_bias(model, name, expected[name])
        _change(model.config, changes)
        structure.forget(model)
        return True
    return False


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}


def _expected(model: nn.Module, config: Any) -> Shapes | None:
    try:
        # Written and read again, since it is then that Transformers checks it (Llama's width by its number of heads).
        again = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            return _shapes(type(model)(again))
    except Exception:
        # A config that the class does not accept describes no model of it.
        return None


def _fits(expected: Shapes, actual: Shapes) -> bool:
    """Every tensor is there with its shape; biases may be missing, since zeros can stand for them."""
    missing = expected.keys() - actual.keys()
    if actual.keys() - expected.keys() or not all(name.endswith(".bias") for name in missing):
        return False
    return all(expected[name] == shape for name, shape in actual.items())


def _change(config: Any, changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        setattr(config, name, value)


def _zero_bias(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    owner = model.get_submodule(name.rpartition(".")[0])
    like = owner.get_parameter("weight")
    owner.register_parameter("bias", nn.Parameter(like.new_zeros(shape), like.requires_grad))


def _candidates(model: nn.Module, actual: Shapes) -> Iterator[dict[str, Any]]:
    """Changes of the config that could explain the shapes, as many at once as possible first."""
    config: Any = model.config
    layers = _layers(model, config)
    base = copy.deepcopy(config)
    _change(base, layers)
    expected = _expected(model, base)
    if expected is None:
        return
    pairs = {
        (e, a)
        for name, shape in actual.items()
        if name in expected and len(expected[name]) == len(shape)
        for e, a in zip(expected[name], shape, strict=True)
        if e != a
    }
    parts = [part for part in (_widths(config, pairs), _heads(config, pairs)) if part]
    extra = {name for name in actual.keys() - expected.keys() if name.endswith(".bias")}
    flags = [name for name in BIASES if getattr(config, name, None) is False] if extra else []
    for count in range(len(parts), -1, -1):
        for chosen in combinations(parts, count):
            for more in range(len(flags) + 1):
                for set_true in combinations(flags, more):
                    merged = {key: value for part in chosen for key, value in part.items()}
                    yield {**layers, **merged, **dict.fromkeys(set_true, True)}


def _layers(model: nn.Module, config: Any) -> dict[str, Any]:
    """Number of layers after blocks were dropped from one list, and the lists in the config that name each layer."""
    drops = [step for step in structure.steps(model) if step["do"] == "drop"]
    if not drops or len({step["module"] for step in drops}) > 1:
        return {}
    key = next((name for name in LAYERS if isinstance(getattr(config, name, None), int)), None)
    if key is None:
        return {}
    before = getattr(config, key)
    kept = list(range(before))
    for step in drops:
        kept = [kept[index] for index in step["keep"]]
    lists = {
        name: [value[index] for index in kept]
        for name, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == before
    }
    return {key: len(kept), **lists}


def _widths(config: Any, pairs: set[tuple[int, int]]) -> dict[str, Any]:
    found = {}
    for key in WIDTHS:
        value = getattr(config, key, None)
        if key == "n_inner" and hasattr(config, key) and value is None:
            value = 4 * config.n_embd
        new = {a for e, a in pairs if e == value}
        if value is not None and len(new) == 1:
            found[key] = new.pop()
    return found


def _heads(config: Any, pairs: set[tuple[int, int]]) -> dict[str, Any]:
    """Fewer heads of the same size, where the config can say the size."""
    size = getattr(config, "head_dim", None)
    heads = getattr(config, "num_attention_heads", None)
    if not hasattr(config, "head_dim") or not heads:
        return {}
    size = size or config.hidden_size // heads
    found: dict[str, Any] = {}
    for key in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, key, None) or heads
        new = {a for e, a in pairs if e == count * size and a % size == 0}
        if hasattr(config, key) and len(new) == 1:
            found[key] = new.pop() // size
    return {**found, "head_dim": size} if found else {}
