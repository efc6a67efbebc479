"""A model's outputs for judging it: in float32, chunk by chunk, checked to be finite.

Shape letters: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.engine.models import model_kind

Item = TypeVar("Item")
Chunks = Iterator[tuple[slice, Tensor]]
# A chunk holds at most this many float32 values (64 MB), whatever the vocabulary.
_CHUNK_VALUES = 1 << 24


def logit_source(model: nn.Module, sample: Tensor | None = None) -> Callable[..., Chunks]:
    """A function `(inputs, keep=None)` that yields (rows, float32 outputs [rows, V]); positions [B, T] are flattened.

    `keep` (bool [B, T]) selects positions. For a causal language model the head is applied to chunks of the last
    hidden states, so that the whole [B, T, V] never exists. Whether backbone and head are all there is (no scaling, no
    soft cap) is tried once on a few tokens of `sample`; where not, the model's own logits are cut into chunks. For
    other models the outputs are logits, or token-mean embeddings where there are none.

    The chunks raise PumiceError, naming the layer, where an output is NaN or infinite.
    """
    head = _plain_head(model, sample)

    def chunks(inputs: dict[str, Any], keep: Tensor | None = None) -> Chunks:
        x = _hidden(model, inputs) if head is not None else outputs_of(model(**inputs), inputs.get("attention_mask"))
        x = x[keep] if keep is not None else x.reshape(-1, x.shape[-1])
        width = _vocabulary(model) if head is not None else x.shape[-1]
        step = max(1, _CHUNK_VALUES // width)
        for start in range(0, len(x), step):
            rows = slice(start, min(start + step, len(x)))
            logits = (head(x[rows]) if head is not None else x[rows]).float()
            if not torch.isfinite(logits).all():
                raise PumiceError(_where_not_finite(model, inputs))
            yield rows, logits

    return chunks


def outputs_of(result: Any, attention_mask: Tensor | None = None) -> Tensor:
    """The tensor that judges a model: its logits, else its hidden states averaged over tokens, else the bare output."""
    if isinstance(result, Tensor):
        return result
    logits = getattr(result, "logits", None)
    if logits is not None:
        return logits
    hidden = getattr(result, "last_hidden_state", None)
    if hidden is not None:
        return mean_pool(hidden, attention_mask)
    if isinstance(result, (tuple, list)) and result and isinstance(result[0], Tensor):
        return result[0]
    raise PumiceError(
        f"the model returns {type(result).__name__} without logits or hidden states: it cannot be judged."
    )


def mean_pool(hidden_BTD: Tensor, attention_mask_BT: Tensor | None) -> Tensor:
    """Mean over the tokens that are not padding, [B, D]."""
    if hidden_BTD.dim() != 3:
        return hidden_BTD.flatten(1)
    if attention_mask_BT is None:
        return hidden_BTD.mean(1)
    weight = attention_mask_BT[..., None].to(hidden_BTD.dtype)
    return (hidden_BTD * weight).sum(1) / weight.sum(1).clamp(min=1)


def has_logits(model: nn.Module) -> bool:
    """Whether the outputs are logits (distributions can be compared) rather than embeddings."""
    return model_kind(model) != "encoder"


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU for a module without any."""
    tensor = next(model.parameters(), None)
    tensor = tensor if tensor is not None else next(model.buffers(), None)
    return tensor.device if tensor is not None else torch.device("cpu")


def to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The same keyword inputs with their tensors on `device`."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def track(items: Iterable[Item], label: str, show: bool) -> Iterable[Item]:
    """Progress with ETA on stderr where a person can watch it, only for what takes longer than two seconds."""
    if not show or not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, desc=label, delay=2.0, leave=False, dynamic_ncols=True)


@contextlib.contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Eval mode and no gradients inside; every submodule's own training flag is put back after."""
    flags = [(module, module.training) for model in models if model is not None for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in flags:
            module.training = training


def computing(model: nn.Module, compute: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 for "bf16", nothing for "auto"; raises PumiceError for any other name."""
    if compute == "auto":
        return contextlib.nullcontext()
    if compute in ("bf16", "bfloat16"):
        return torch.autocast(device_of(model).type, torch.bfloat16)
    raise PumiceError(f"compute {compute!r} is not known: use auto (the model's own type) or bf16 (autocast).")


def _plain_head(model: nn.Module, sample: Tensor | None) -> nn.Module | None:
    """The head, if logits are exactly head(backbone(ids)); tried on the first tokens of `sample`."""
    if sample is None or model_kind(model) != "causal-lm":
        return None
    model_any: Any = model
    head = model_any.get_output_embeddings()
    config = model_any.config.get_text_config()
    # A soft cap is the identity for the small logits that a few tokens may give, so that no trial could rule it out.
    if head is None or model_any.base_model is model or getattr(config, "final_logit_softcapping", None):
        return None
    probe = {"input_ids": sample[:1, :8]}
    with evaluating(model):
        theirs = model(**probe).logits.float()
        ours = head(_hidden(model, probe)).float()
    same = ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 1e-3 * theirs.abs().max())
    return head if same else None


def _hidden(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _where_not_finite(model: nn.Module, inputs: dict[str, Any]) -> str:
    """Sentence naming the first module, in order of execution, whose output is not finite; runs the model again."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    where = f"first in the output of layer {found[0]!r}" if found else "in its logits"
    return f"the model gives NaN or Inf, {where}: check that layer's weights, or use a wider dtype (bfloat16, float32)."
