"""How fast a model is beside dense: prefill and decode, every model in the same run, medians.

Shape letters: B batch, T tokens.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.engine.data import as_inputs
from pumice.engine.logits import device_of, evaluating, to_device
from pumice.engine.models import context_length, model_kind
from pumice.weights.modules import SparseModule


@dataclass
class BenchRow:
    """One model at one batch size: median rates and their ratio to dense (above 1 = faster than dense).

    `prefill` and `decode` in tokens per second over the whole batch; `forward` in examples per second for modules
    that are no language models.
    """

    name: str
    batch: int
    prefill: float | None = None
    decode: float | None = None
    forward: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)


@dataclass
class BenchResult:
    """Rows of one interleaved run, bytes in memory of every model, the settings and the machine."""

    rows: list[BenchRow]
    bytes: dict[str, int]
    settings: dict[str, Any]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON."""
        return asdict(self)

    def row(self, name: str, batch: int) -> BenchRow:
        """The row of a model at a batch size; raises KeyError."""
        for row in self.rows:
            if (row.name, row.batch) == (name, batch):
                return row
        raise KeyError((name, batch))


def bench(
    model: nn.Module | Mapping[str, nn.Module],
    *,
    against: str | nn.Module | None = "dense",
    batch: int | Sequence[int] = (1, 16),
    threads: int | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    tokenizer: Any = None,
    inputs: Any = None,
) -> BenchResult:
    """Time models and the dense one in turns, so that a machine that slows down slows all of them.

    `model`: one module (shown as "sparse"), or several by name. `against`: a dense module, "dense" (made by unpacking
    a copy, which needs the memory for it; an entry named "dense" of `model` is used instead), or None. Language models
    read `prompt_tokens` tokens and decode `new_tokens` with a KV cache; other modules run forward on `inputs` (image models
    of Transformers on a random picture without it), whose first example is repeated to each batch size. One round warms up, then the median of `repeats` rounds counts.
    With `tokenizer`, prompts are drawn from its vocabulary's size. Raises PumiceError for settings that cannot be.
    """
    from pumice.kernels.features import machine_stamp

    sizes = [batch] if isinstance(batch, int) else list(batch)
    for name, values in (("batch", sizes), ("repeats", [repeats]), ("new_tokens", [new_tokens])):
        if not values or any(not isinstance(value, int) or value < 1 for value in values):
            raise PumiceError(f"{name} = {values} must hold whole numbers of at least 1.")
    models = _models(model, against)
    first = next(iter(models.values()))
    read_tokens = inputs is None and example_images(first) is None
    limit = context_length(first)
    if read_tokens and limit is not None and prompt_tokens + new_tokens > limit:
        raise PumiceError(
            f"prompt_tokens {prompt_tokens} + new_tokens {new_tokens} exceed the context of {limit}: lower either."
        )
    runs = {
        (name, size): _runner(net, inputs, size, prompt_tokens, new_tokens, tokenizer)
        for name, net in models.items()
        for size in sizes
    }
    with _threads(threads), evaluating(*models.values()):
        used = torch.get_num_threads()
        times = _interleave(runs, repeats)
    rows = [_row(key, times[key]) for key in runs]
    _ratios(rows)
    settings = {
        "threads": used,
        "prompt_tokens": prompt_tokens if read_tokens else None,
        "new_tokens": new_tokens if read_tokens else None,
        "repeats": repeats,
        "dtypes": {name: _dtype(net) for name, net in models.items()},
    }
    return BenchResult(rows, {name: model_bytes(net) for name, net in models.items()}, settings, machine_stamp())


def example_images(model: nn.Module) -> dict[str, Tensor] | None:
    """One random image as the config of a Hugging Face image model describes it, or None for any other model.

    Times do not depend on what a picture shows.
    """
    config: Any = getattr(model, "config", None)
    if config is None or getattr(model, "main_input_name", "") != "pixel_values":
        return None
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    shape = (1, getattr(config, "num_channels", 3), height, width)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels.to(device_of(model), next(model.parameters()).dtype)}


def rows_of(model: nn.Module, batch: Sequence[int], tokens: int) -> list[int]:
    """Rows that a linear layer sees at these batch sizes, to pack for: one per sequence where a model decodes, else
    every token, or every patch of an image."""
    if model_kind(model) == "causal-lm":
        return list(batch)
    images = example_images(model)
    if images is not None:
        patch = getattr(getattr(model, "config", None), "patch_size", None)
        tokens = images["pixel_values"][0, 0].numel() // patch**2 if isinstance(patch, int) else tokens
    return [size * max(1, tokens) for size in batch]


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model in memory: parameters and buffers, each storage counted once (tied weights, views), and what the
    backends of sparse layers keep beside them."""
    storages: dict[tuple[str, int], int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        # An empty storage has no address of its own, and would hide or be hidden by others.
        if storage.nbytes():
            storages[(str(tensor.device), storage.data_ptr())] = storage.nbytes()
    beside = sum(module.derived_nbytes for module in model.modules() if isinstance(module, SparseModule))
    return sum(storages.values()) + beside


def _models(model: nn.Module | Mapping[str, nn.Module], against: str | nn.Module | None) -> dict[str, nn.Module]:
    """Models by name, dense first."""
    models = {"sparse": model} if isinstance(model, nn.Module) else dict(model)
    if not models:
        raise PumiceError("model is empty: give at least one module.")
    if against is None or (against == "dense" and "dense" in models):
        return {name: models[name] for name in sorted(models, key=lambda name: name != "dense")}
    if isinstance(against, nn.Module):
        return {"dense": against, **models}
    if against != "dense":
        raise PumiceError(f"against = {against!r} is not known: give 'dense', a module or None.")
    from pumice.engine.pack import unpack

    return {"dense": unpack(copy.deepcopy(next(iter(models.values())))), **models}


Timed = Callable[[], dict[str, tuple[float, float]]]


def _runner(model: nn.Module, inputs: Any, size: int, prompt_tokens: int, new_tokens: int, tokenizer: Any) -> Timed:
    """A function that runs once and returns measure -> (amount, seconds)."""
    device = device_of(model)
    inputs = example_images(model) if inputs is None else inputs
    if inputs is not None:
        example = to_device(as_inputs(model, inputs), device)
        repeated = {name: _repeat(value, size) for name, value in example.items()}
        return lambda: {"forward": (size, _timed(lambda: model(**repeated), device)[1])}
    if not hasattr(model, "config") or getattr(model, "main_input_name", "") != "input_ids":
        raise PumiceError(f"{type(model).__name__} reads no token ids: give example inputs as inputs=.")
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    if tokenizer is not None:
        vocabulary = min(vocabulary, len(tokenizer))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (size, prompt_tokens), generator=generator).to(device)
    if model_kind(model) == "causal-lm":
        return lambda: _prefill_decode(model, ids, new_tokens)
    extra = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    return lambda: {"prefill": (ids.numel(), _timed(lambda: model(input_ids=ids, **extra), device)[1])}


def _prefill_decode(model: Any, ids: Tensor, new_tokens: int) -> dict[str, tuple[float, float]]:
    """Read the prompts [B, T], then decode greedily one token a step with the KV cache."""
    device = ids.device
    # Generation needs the logits of the last position only; computing all would time the head, not the prefill.
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    out, prefill = _timed(lambda: model(input_ids=ids, use_cache=True, **keep), device)
    token = out.logits[:, -1:].argmax(-1)

    def decode() -> None:
        past, last = out.past_key_values, token
        for _ in range(new_tokens):
            step = model(input_ids=last, past_key_values=past, use_cache=True)
            past, last = step.past_key_values, step.logits[:, -1:].argmax(-1)

    _, seconds = _timed(decode, device)
    return {"prefill": (ids.numel(), prefill), "decode": (len(ids) * new_tokens, seconds)}


def _timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - begin


def _interleave(runs: Mapping[tuple[str, int], Timed], repeats: int) -> dict[tuple[str, int], dict[str, list[float]]]:
    """Rates of every run, [repeats] each; round by round through all runs, the first round thrown away."""
    rates: dict[tuple[str, int], dict[str, list[float]]] = {key: {} for key in runs}
    for round_number in range(repeats + 1):
        for key, run in runs.items():
            for measure, (amount, seconds) in run().items():
                if round_number:
                    rates[key].setdefault(measure, []).append(amount / max(seconds, 1e-9))
    return rates


def _row(key: tuple[str, int], rates: Mapping[str, list[float]]) -> BenchRow:
    medians = {measure: statistics.median(values) for measure, values in rates.items()}
    return BenchRow(*key, prefill=medians.get("prefill"), decode=medians.get("decode"), forward=medians.get("forward"))


def _ratios(rows: Sequence[BenchRow]) -> None:
    dense = {row.batch: row for row in rows if row.name == "dense"}
    for row in rows:
        for measure in ("prefill", "decode", "forward"):
            mine = getattr(row, measure)
            theirs = getattr(dense[row.batch], measure) if row.batch in dense else None
            if mine is not None and theirs:
                row.ratios[measure] = mine / theirs


def _repeat(value: Any, size: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value[:1].repeat(size, *[1] * (value.dim() - 1))


def _dtype(model: nn.Module) -> str:
    tensor = next(model.parameters(), None)
    return str(tensor.dtype).removeprefix("torch.") if tensor is not None else "none"


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise PumiceError(f"threads = {count} must be at least 1.")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
