"""What a model is worth: perplexity, agreement with dense, retrieval and top-1, each with its protocol stated.

Shape letters: B batch, T tokens, V vocabulary, N examples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.engine.data import as_inputs, consecutive_windows, evaluation_windows, is_text, load_text, make_data
from pumice.engine.logits import computing, device_of, evaluating, has_logits, logit_source, to_device, track
from pumice.engine.models import context_length, model_kind


@dataclass
class Agreement:
    """How close a model's outputs are to dense ones.

    `kl` = mean KL(dense || model) in nats and `top1` = share of equal argmaxes, per token (or per example for a
    classifier); `cosine` = mean cosine of the embeddings, for encoders, which have no logits. `count` outputs compared.
    """

    kl: float | None
    top1: float | None
    cosine: float | None
    count: int


@dataclass
class EvalResult:
    """What `evaluate` found; None or empty where a measure does not apply. `seqlen` tokens in each of `windows`."""

    kind: str
    perplexity: float | None = None
    seqlen: int | None = None
    windows: int | None = None
    agreement: Agreement | None = None
    accuracy: float | None = None
    retrieval: dict[str, float] | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    compute: str = "auto"
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON."""
        return asdict(self)


def evaluate(
    model: nn.Module,
    *,
    data: Any = None,
    tasks: Sequence[str] | str = (),
    seqlen: int = 2048,
    tokenizer: Any = None,
    dense: nn.Module | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    compute: str = "auto",
    progress: bool = True,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
) -> EvalResult:
    """Judge a model by what its kind allows, beside `dense` where that is given.

    Causal language models: token perplexity over non-overlapping windows of `seqlen` tokens (at most the context),
    from `data` (text, file, dataset, or token ids; None = the evaluation half of the default text), and `tasks`
    (names in `tasks_dir`, paths of .jsonl, or lm-eval tasks; at most `limit` questions each). Encoders: nDCG@10 where
    `data` is retrieval data (or a folder in Cranfield's format). Others: top-1 where `data` yields (input, label).
    With `dense`: agreement on the same inputs. `compute` "bf16" runs under autocast: float32 models get bfloat16
    matmuls with float32 accumulation, which is faster where the CPU has them.

    Raises PumiceError: text too short, no tokenizer, NaN or Inf in the logits.
    """
    from pumice.engine.retrieval import RetrievalData, load_cranfield, retrieval
    from pumice.engine.zeroshot import find_tasks, run_tasks

    begin = time.perf_counter()
    result = EvalResult(kind=model_kind(model), compute=compute)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if names and result.kind != "causal-lm":
        raise PumiceError(f"tasks {names} need a causal language model, and this is {result.kind}: leave tasks empty.")
    if names:
        find_tasks(names, tasks_dir)
    if isinstance(data, (str, Path)) and Path(data).is_dir():
        data = load_cranfield(data)
    with evaluating(model, dense):
        if isinstance(data, RetrievalData):
            result.retrieval = retrieval(model, data, tokenizer=tokenizer, dense=dense, progress=progress)
        elif result.kind == "causal-lm":
            windows = _windows(model, tokenizer, data, seqlen, max_windows, result)
            result.seqlen, result.windows = windows.shape[1], len(windows)
            options: dict[str, Any] = {"batch_size": batch_size, "compute": compute, "progress": progress}
            result.perplexity = perplexity(model, windows, **options)
            if dense is not None:
                result.agreement = agreement(model, dense, windows, **options)
        else:
            options = {"compute": compute, "progress": progress}
            _evaluate_other(model, dense, data, tokenizer, result, options, max_windows)
        if names:
            result.tasks = run_tasks(
                model, tokenizer, names, tasks_dir=tasks_dir, limit=limit, compute=compute, progress=progress
            )
    result.seconds = time.perf_counter() - begin
    return result


def perplexity(
    model: nn.Module, windows: Tensor, *, batch_size: int = 1, compute: str = "auto", progress: bool = False
) -> float:
    """Token perplexity over windows of ids [N, T]: exp of the mean negative log-likelihood of tokens 2..T of each.

    Raises PumiceError where a logit is NaN or infinite.
    """
    if windows.dim() != 2 or windows.shape[1] < 2 or len(windows) == 0:
        raise PumiceError(f"windows of shape {tuple(windows.shape)} cannot be scored: token ids [N, T] with T >= 2.")
    device = device_of(model)
    total, count = 0.0, 0
    with evaluating(model), computing(model, compute):
        logits_of = logit_source(model, windows[:1].to(device))
        for batch in track(windows.split(batch_size), "perplexity", progress):
            ids = batch.to(device)
            keep = torch.ones_like(ids, dtype=torch.bool)
            keep[:, -1] = False
            targets = ids[:, 1:].reshape(-1)
            for rows, logits in logits_of({"input_ids": ids}, keep):
                total += F.cross_entropy(logits, targets[rows], reduction="sum").item()
            count += targets.numel()
    # exp overflows a float beyond 709 nats; such a model is as bad as infinity, and JSON has no infinity.
    return math.exp(min(total / count, 700.0))


def agreement(
    model: nn.Module,
    dense: nn.Module,
    inputs: Tensor | Iterable[Any],
    *,
    batch_size: int = 1,
    compute: str = "auto",
    progress: bool = False,
) -> Agreement:
    """KL(dense || model) and top-1 agreement over the same inputs, or cosine of embeddings for encoders.

    `inputs`: token windows [N, T], or batches (dicts, tensors, (input, label) pairs). Raises PumiceError on NaN.
    """
    batches = inputs.split(batch_size) if isinstance(inputs, Tensor) else inputs
    total = {"kl": 0.0, "top1": 0.0, "cosine": 0.0}
    count = 0
    sources: list[Callable[..., Iterator[tuple[slice, Tensor]]]] = []
    with evaluating(model, dense), computing(model, compute):
        for batch in track(batches, "agreement", progress):
            ours_in, theirs_in = (to_device(as_inputs(m, batch), device_of(m)) for m in (model, dense))
            if not sources:
                sources = [
                    logit_source(model, ours_in.get("input_ids")),
                    logit_source(dense, theirs_in.get("input_ids")),
                ]
            for (_, ours), (_, theirs) in zip(sources[0](ours_in), sources[1](theirs_in), strict=True):
                _compare(ours, theirs.to(ours.device), has_logits(model), total)
                count += len(ours)
    if count == 0:
        raise PumiceError("agreement was given no inputs: give at least one batch.")
    mean = {name: value / count for name, value in total.items()}
    if has_logits(model):
        return Agreement(kl=max(mean["kl"], 0.0), top1=mean["top1"], cosine=None, count=count)
    return Agreement(kl=None, top1=None, cosine=mean["cosine"], count=count)


def _compare(ours: Tensor, theirs: Tensor, logits: bool, total: dict[str, float]) -> None:
    if ours.shape != theirs.shape:
        raise PumiceError(
            f"dense gives outputs {tuple(theirs.shape)} and the model {tuple(ours.shape)}: not comparable."
        )
    if not logits:
        total["cosine"] += F.cosine_similarity(ours, theirs, dim=-1).sum().item()
        return
    log_p, log_q = F.log_softmax(theirs, -1), F.log_softmax(ours, -1)
    total["kl"] += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
    total["top1"] += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()


def top1(model: nn.Module, loader: Iterable[Any], *, compute: str = "auto", progress: bool = False) -> float:
    """Share of examples whose largest logit is the label, over batches of (input, label) or dicts with `labels`."""
    device = device_of(model)
    right = count = 0
    with evaluating(model), computing(model, compute):
        logits_of = logit_source(model)
        for batch in track(loader, "top-1", progress):
            labels = _labels(batch)
            if labels is None:
                raise PumiceError("top-1 needs labels: give batches of (input, label), or dicts with `labels`.")
            inputs = {name: value for name, value in as_inputs(model, batch).items() if name != "labels"}
            labels = labels.to(device).reshape(-1)
            for rows, logits in logits_of(to_device(inputs, device)):
                right += int((logits.argmax(-1) == labels[rows]).sum())
            count += labels.numel()
    if count == 0:
        raise PumiceError("top-1 was given no examples: give at least one batch.")
    return right / count


def _labels(batch: Any) -> Tensor | None:
    if hasattr(batch, "items"):
        return batch.get("labels")
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[1]
    return None


def _windows(
    model: nn.Module, tokenizer: Any, data: Any, seqlen: int, max_windows: int | None, result: EvalResult
) -> Tensor:
    """Evaluation windows [N, T] from text or token ids; notes on the result what was changed."""
    if isinstance(data, Tensor):
        if data.is_floating_point():
            raise PumiceError("data of a language model must be token ids (integers), not floating point.")
        if data.dim() == 2:
            return data[:max_windows]
    limit = context_length(model)
    if limit is not None and seqlen > limit:
        result.notes.append(f"seqlen {seqlen} was lowered to the model's context of {limit} tokens")
        seqlen = limit
    if isinstance(data, Tensor):
        return consecutive_windows(data.reshape(-1), seqlen, max_windows)
    if not (data is None or isinstance(data, (str, Path, list))):
        raise PumiceError(f"data is a {type(data).__name__}: a language model is judged on text or on token ids.")
    if tokenizer is None:
        raise PumiceError("data is text and there is no tokenizer: pass tokenizer=, or token ids as data.")
    text = data if isinstance(data, list) else load_text(data, purpose="evaluation")
    if data is None:
        result.notes.append("data: evaluation half of the default text (Python's language reference)")
    return evaluation_windows(text, tokenizer, seqlen, max_windows, source=data)


def _evaluate_other(
    model: nn.Module,
    dense: nn.Module | None,
    data: Any,
    tokenizer: Any,
    result: EvalResult,
    options: dict[str, Any],
    max_batches: int | None,
) -> None:
    """Top-1 where the batches carry labels, agreement where dense is there; raises PumiceError where neither is."""
    if is_text(data) or isinstance(data, (Tensor, dict)):
        batches: list[Any] = make_data(model, tokenizer, data, samples=max_batches or 64, seqlen=256)
    else:
        batches = list(islice(data, max_batches))
    labelled = bool(batches) and _labels(batches[0]) is not None
    if labelled:
        result.accuracy = top1(model, batches, **options)
    if dense is not None:
        result.agreement = agreement(model, dense, batches, **options)
    if not labelled and dense is None:
        raise PumiceError(
            f"nothing to measure on this {result.kind}: give labelled data, retrieval data, or dense= to compare."
        )
