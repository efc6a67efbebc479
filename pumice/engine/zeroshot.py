"""Zero-shot accuracy: multiple choice and last-word prediction on local jsonl, anything else through lm-eval.

A row of a .jsonl is one of three shapes:
`{"query", "choices", "gold"}` (which continuation is likeliest), `{"context_options", "continuation", "gold"}` (after
which context the same continuation is likeliest), `{"context", "continuation"}` (is greedy decoding right).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.engine.logits import computing, device_of, evaluating, logit_source, to_device, track
from pumice.engine.models import context_length

# Padded tokens of one forward pass: enough rows to fill the cores, few enough that activations stay small.
_BATCH_TOKENS = 2048


@dataclass
class Request:
    """One string to score: token ids of context and continuation, and where the continuation starts."""

    ids: list[int]
    start: int


@dataclass
class Question:
    """The scored strings of one row, the right one's index (None: greedy match), and the length of each in bytes."""

    requests: list[Request]
    gold: int | None
    lengths: list[int]


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    compute: str = "auto",
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Accuracy of each task by name: a .jsonl path, a name in `tasks_dir`, or else a task of lm-eval.

    Raises PumiceError for a task found nowhere (what `tasks_dir` holds is listed), or without a tokenizer.
    """
    if tokenizer is None:
        raise PumiceError(f"tasks {list(tasks)} are text and there is no tokenizer: pass tokenizer=.")
    files, remote = find_tasks(tasks, tasks_dir)
    options: dict[str, Any] = {"limit": limit, "compute": compute, "progress": progress}
    results = {file.stem: jsonl_task(model, tokenizer, file, **options) for file in files}
    if remote:
        results.update(lm_eval_tasks(model, tokenizer, remote, limit=limit))
    return results


def find_tasks(tasks: Sequence[str], tasks_dir: str | Path | None = None) -> tuple[list[Path], list[str]]:
    """Files of the local tasks, and the names that are lm-eval's; reads none of their questions.

    Raises:
        PumiceError: a file or folder that does not exist, or a name that is neither local nor known to lm-eval.
    """
    found = {task: _local(task, tasks_dir) for task in tasks}
    remote = [task for task, file in found.items() if file is None]
    if remote:
        _check_remote(remote, tasks_dir)
    return [file for file in found.values() if file is not None], remote


def _check_remote(tasks: Sequence[str], tasks_dir: str | Path | None) -> None:
    known = sorted(file.stem for file in Path(tasks_dir).glob("*.jsonl")) if tasks_dir is not None else []
    here = f"the tasks folder holds {', '.join(known)}" if known else "no tasks folder (--tasks-dir) was given"
    if importlib.util.find_spec("lm_eval") is None:
        raise PumiceError(
            f"tasks {', '.join(tasks)} are not local ({here}), and lm-eval is not installed: give .jsonl files, or run "
            "`pip install pumice[eval]`."
        )
    names = [task for task in tasks if Path(task).suffix != ".yaml"]
    if not names:
        return
    # Reading lm-eval's index takes seconds; evaluating before an unknown name is found would take minutes.
    manager: Any = importlib.import_module("lm_eval.tasks").TaskManager()
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise PumiceError(
            f"tasks {', '.join(unknown)} are neither local ({here}) nor known to lm-eval: check their names."
        )


def jsonl_task(
    model: nn.Module,
    tokenizer: Any,
    file: str | Path,
    *,
    limit: int | None = None,
    compute: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Accuracy on one local file: `acc`, `acc_norm` (log-likelihood per byte of the choice), their `_stderr`, and `n`.

    lm-eval's conventions: choices follow the query by one blank, a query "Question: ..." gets the line "Answer:", and
    tokens of the context are counted in the encoding of the whole. `acc_norm` divides by UTF-8 bytes (lm-eval counts
    characters, the same for ASCII). Last-word rows give `acc` and the `perplexity` of the last word.
    """
    path = Path(file)
    questions = _questions(path, tokenizer, context_length(model), limit)
    flat = [request for question in questions for request in question.requests]
    scores = score(model, flat, compute=compute, progress=progress, label=path.stem)
    right: list[bool] = []
    right_norm: list[bool] = []
    nll = 0.0
    position = 0
    for question in questions:
        mine = scores[position : position + len(question.requests)]
        position += len(mine)
        if question.gold is None:
            right.append(mine[0][1])
            nll -= mine[0][0]
            continue
        raw = [value for value, _ in mine]
        normed = [value / length for value, length in zip(raw, question.lengths, strict=True)]
        right.append(raw.index(max(raw)) == question.gold)
        right_norm.append(normed.index(max(normed)) == question.gold)
    result: dict[str, Any] = {"n": len(questions), **_accuracy("acc", right)}
    if right_norm:
        result.update(_accuracy("acc_norm", right_norm))
    if greedy := len(right) - len(right_norm):
        result["perplexity"] = math.exp(min(nll / greedy, 700.0))
    return result


def score(
    model: nn.Module,
    requests: Sequence[Request],
    *,
    compute: str = "auto",
    progress: bool = False,
    label: str = "zero-shot",
) -> list[tuple[float, bool]]:
    """(log-likelihood in nats of the continuation, whether greedy decoding gives it) for every request.

    Rows of like length share a batch and are padded on the right, which a causal model cannot see; the head runs on
    the continuations' positions only.
    """
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))
    results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    device = device_of(model)
    with evaluating(model), computing(model, compute):
        source = logit_source(model, torch.tensor([requests[order[0]].ids], device=device))
        for chosen in track(_batches(order, requests), label, progress):
            batch = [requests[i] for i in chosen]
            inputs, keep, targets = _padded(batch)
            values, hits = [], []
            for rows, logits in source(to_device(inputs, device), keep.to(device)):
                wanted = targets[rows].to(device)
                values.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].cpu())
                hits.append((logits.argmax(-1) == wanted).cpu())
            counts = keep.sum(1).tolist()
            pieces = zip(torch.cat(values).split(counts), torch.cat(hits).split(counts), strict=True)
            for i, (value, hit) in zip(chosen, pieces, strict=True):
                results[i] = (float(value.double().sum()), bool(hit.all()))
    return results


def lm_eval_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-evaluation-harness on the model in memory: metrics by task, with lm-eval's filter suffix removed.

    A task is a name that lm-eval knows or the path of a task's .yaml. Raises PumiceError where lm-eval cannot run one.
    """
    # Its decorators hide its signatures from type checkers.
    simple_evaluate: Any = importlib.import_module("lm_eval").simple_evaluate
    wrapper: Any = importlib.import_module("lm_eval.models.huggingface").HFLM

    try:
        wrapped = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        output = simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)
    except (KeyError, ValueError, OSError) as error:
        raise PumiceError(
            f"lm-eval could not run tasks {', '.join(tasks)} ({error}): check their names and the network."
        ) from error
    return {
        task: {
            "n" if name == "sample_len" else name.removesuffix(",none"): value
            for name, value in metrics.items()
            if name not in ("alias", "name")
        }
        for task, metrics in output["results"].items()
    }


def _local(task: str, tasks_dir: str | Path | None) -> Path | None:
    path = Path(task).expanduser()
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise PumiceError(f"tasks: {task!r} does not exist: give an existing .jsonl file, or a task's name.")
        return path
    if tasks_dir is None:
        return None
    if not Path(tasks_dir).is_dir():
        raise PumiceError(f"tasks_dir {str(tasks_dir)!r} is no folder: give the folder that holds the .jsonl files.")
    file = Path(tasks_dir) / f"{task}.jsonl"
    return file if file.is_file() else None


def _questions(path: Path, tokenizer: Any, limit_tokens: int | None, limit: int | None) -> list[Question]:
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        if limit is not None and len(questions) >= limit:
            break
        try:
            questions.append(_question(json.loads(line), tokenizer, limit_tokens))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise PumiceError(
                f"tasks: line {number} of {path.name} is no question ({type(error).__name__}: {error}): a line holds "
                "query/choices/gold, context_options/continuation/gold or context/continuation."
            ) from error
    if not questions:
        raise PumiceError(f"tasks: {path.name} holds no questions: check the file, and that limit is at least 1.")
    return questions


def _question(row: dict[str, Any], tokenizer: Any, limit: int | None) -> Question:
    if "choices" in row:
        query = row["query"]
        if query.startswith("Question:") and "Answer:" not in query:
            query = query.rstrip() + "\nAnswer:"
        pairs = [(query, _spaced(query, choice)) for choice in row["choices"]]
        lengths = [len(choice.encode()) for choice in row["choices"]]
    elif "context_options" in row:
        pairs = [(context, _spaced(context, row["continuation"])) for context in row["context_options"]]
        lengths = [len(row["continuation"].encode())] * len(pairs)
    else:
        pairs, lengths = [(row["context"], _spaced(row["context"], row["continuation"]))], [1]
        return Question([_request(tokenizer, *pair, limit) for pair in pairs], None, lengths)
    if not 0 <= row["gold"] < len(pairs):
        raise ValueError(f"gold = {row['gold']} of {len(pairs)} choices")
    return Question([_request(tokenizer, *pair, limit) for pair in pairs], int(row["gold"]), [n or 1 for n in lengths])


def _spaced(context: str, continuation: str) -> str:
    """The continuation behind one blank, unless a blank is there already."""
    return continuation if context[-1:].isspace() or continuation[:1].isspace() else " " + continuation


def _request(tokenizer: Any, context: str, continuation: str, limit: int | None) -> Request:
    # Blanks at the end of a context belong to the next token in most vocabularies, so they are scored with it.
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    whole = list(tokenizer(context + continuation)["input_ids"])
    start = min(max(len(tokenizer(context)["input_ids"]), 1), len(whole) - 1)
    if start < 1:
        raise ValueError("nothing to score")
    # Too long: the oldest tokens of the context go. The last token is only predicted, so limit + 1 fit.
    cut = max(0, len(whole) - 1 - limit) if limit is not None else 0
    return Request(whole[cut:], max(start - cut, 1))


def _batches(order: list[int], requests: Sequence[Request]) -> list[list[int]]:
    """Indices in batches of at most _BATCH_TOKENS padded tokens; `order` goes from long to short."""
    batches: list[list[int]] = []
    position = 0
    while position < len(order):
        rows = max(1, _BATCH_TOKENS // len(requests[order[position]].ids))
        batches.append(order[position : position + rows])
        position += rows
    return batches


def _padded(batch: Sequence[Request]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(inputs [B, T], positions that predict a continuation's token [B, T], those tokens in that order)."""
    width = max(len(request.ids) for request in batch) - 1
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    keep = torch.zeros(len(batch), width, dtype=torch.bool)
    targets: list[int] = []
    for row, request in enumerate(batch):
        length = len(request.ids) - 1
        ids[row, :length] = torch.tensor(request.ids[:-1])
        mask[row, :length] = 1
        keep[row, request.start - 1 : length] = True
        targets.extend(request.ids[request.start :])
    return {"input_ids": ids, "attention_mask": mask}, keep, torch.tensor(targets)


def _accuracy(name: str, right: Sequence[bool]) -> dict[str, float]:
    mean = sum(right) / len(right)
    spread = math.sqrt(mean * (1 - mean) / (len(right) - 1)) if len(right) > 1 else 0.0
    return {name: mean, f"{name}_stderr": spread}
