"""Text that a language model writes itself: what a repair can learn from where there is little or no text."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.progress import bar
from pumice.core.stats import evaluating

NAME = "written"
"""What `data` is called then."""


def write_windows(
    model: nn.Module, count: int, length: int, *, seed: int = 0, batch: int = 128, progress: bool = True
) -> Tensor:
    """Sample windows from a causal language model at temperature 1, each from the token that begins a text.

    A pruned model that learns from a small text learns it by heart; what the dense model writes is as much text as one
    has time for, of the kind that it knows (LLM-QAT, arXiv:2305.17888, does so for quantisation). The whole
    distribution is sampled, without top-k or top-p, and a window may go on with a new text where one ends.

    Args:
        count, length: windows, and tokens in each.
        batch: windows written at once.

    Returns:
        int64 [count, length].

    Raises:
        PumiceError: the model cannot generate, or its config names no token to begin with.
    """
    if not hasattr(model, "generate") or not _is_causal(model):
        raise PumiceError(f"data={NAME!r}: {type(model).__name__} cannot write text; give a text with data=….")
    bos = getattr(model.config, "bos_token_id", None)
    if bos is None:
        raise PumiceError(f"data={NAME!r}: the config of {type(model).__name__} has no bos_token_id; give a text.")
    how: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": None}
    how |= {"min_new_tokens": length - 1, "max_new_tokens": length - 1, "pad_token_id": 0}
    device, made = next(model.parameters()).device, []
    with torch.random.fork_rng(), torch.inference_mode(), evaluating(model):
        torch.manual_seed(seed)
        with bar(count, "write text", enabled=progress, unit="window") as shown:
            while sum(map(len, made)) < count:
                start = torch.full((batch, 1), bos, device=device)
                made.append(model.generate(start, attention_mask=torch.ones_like(start), **how))
                shown.update(min(batch, count - shown.n))
    return torch.cat(made)[:count].clone()


def _is_causal(model: nn.Module) -> bool:
    can = getattr(model, "can_generate", None)
    decoder = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return decoder and callable(can) and bool(can()) and "input_ids" in inspect.signature(model.forward).parameters
