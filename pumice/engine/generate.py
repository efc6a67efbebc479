"""Text from a model, with prefill and decode timed apart."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from pumice.core.errors import PumiceError
from pumice.engine.fuse import fuse, is_fused, unfuse
from pumice.engine.logits import device_of, evaluating
from pumice.engine.models import context_length, model_kind


@dataclass
class Generation:
    """Generated text and its speed; `tokens_per_second` is decode only (the first token belongs to prefill)."""

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON."""
        return asdict(self)


class _Clock:
    """A Transformers streamer that only notes when tokens arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    chat: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
    fused: bool = True,
) -> Generation:
    """Continue a prompt through Hugging Face's generate; greedy at temperature 0, else sampled with `seed`.

    With `chat` the prompt becomes a user's turn where the tokenizer has a chat template. Prefill lasts until the first
    new token. With `fused` a token goes through all layers in one call (`pumice.fuse`), where the model is of a kind that
    can. Raises PumiceError: no language model, no tokenizer, empty prompt, prompt beyond the context.
    """
    if model_kind(model) not in ("causal-lm", "seq2seq-lm"):
        raise PumiceError(f"generate needs a language model and got {type(model).__name__} ({model_kind(model)}).")
    if tokenizer is None:
        raise PumiceError("generate needs a tokenizer: pass tokenizer=, or put its files beside the model.")
    if max_new_tokens < 1 or temperature < 0:
        raise PumiceError(
            f"max_new_tokens = {max_new_tokens} must be at least 1 and temperature = {temperature} at least 0."
        )
    inputs = {name: value.to(device_of(model)) for name, value in _encode(tokenizer, prompt, chat).items()}
    length = inputs["input_ids"].shape[1]
    limit = context_length(model)
    if limit is not None and length >= limit:
        raise PumiceError(f"prompt has {length} tokens and the model's context is {limit}: shorten the prompt.")
    if limit is not None and model_kind(model) == "causal-lm":
        max_new_tokens = min(max_new_tokens, limit - length)
    clock = _Clock()
    options: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens, "streamer": clock}
    # Greedy decoding warns about sampling options that a model's own generation config may set; None unsets them.
    options |= {"temperature": temperature, "top_k": 0} if temperature > 0 else dict.fromkeys(_SAMPLING)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        options["pad_token_id"] = tokenizer.eos_token_id
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=devices), _one_call(model, fused):
        torch.manual_seed(seed)
        begin = time.perf_counter()
        output = model.generate(**inputs, **options)  # pyright: ignore[reportCallIssue]
        end = time.perf_counter()
    new = output[0] if model_kind(model) == "seq2seq-lm" else output[0, length:]
    return _result(tokenizer, new.tolist(), length, begin, clock.times, end)


@contextmanager
def _one_call(model: nn.Module, wanted: bool) -> Iterator[None]:
    """The model fused, or as it is: where that cannot be, or it is already."""
    if not wanted or is_fused(model):
        yield
        return
    try:
        fuse(model)
    except PumiceError:
        yield
        return
    try:
        yield
    finally:
        unfuse(model)


_SAMPLING = ("temperature", "top_p", "top_k")


def _result(
    tokenizer: Any, new: list[int], prompt_tokens: int, begin: float, times: list[float], end: float
) -> Generation:
    # The streamer is handed the prompt first, then each new token.
    first = times[1] if len(times) > 1 else end
    decoded = max(len(times) - 2, 0)
    last = times[-1] if decoded else first
    return Generation(
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=prompt_tokens,
        new_tokens=len(new),
        prefill_seconds=first - begin,
        decode_seconds=last - first,
        tokens_per_second=decoded / (last - first) if decoded and last > first else None,
    )


def _encode(tokenizer: Any, prompt: str, chat: bool) -> dict[str, torch.Tensor]:
    if chat and getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    if encoded["input_ids"].shape[-1] == 0:
        raise PumiceError("prompt is empty: give at least one word.")
    return {name: value for name, value in encoded.items() if name in ("input_ids", "attention_mask")}
