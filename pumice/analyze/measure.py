"""From models to what a report shows of them: dense and sparse measured beside each other."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pumice.analyze.record import Column, Run, Sentences
from pumice.core.errors import PumiceError

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
STAMPED = ("python", "torch", "transformers", "pumice")
NEW_TOKENS = 48


def stamp(run: Run) -> Run:
    """Put versions and machine into a run; returns it."""
    from pumice.kernels.features import machine_stamp

    found = machine_stamp()
    run.versions = {name: found.pop(name) for name in STAMPED if name in found}
    run.machine = found
    return run


def model_facts(source: str | Path, name: str | None = None) -> dict[str, Any]:
    """Name, place and bytes of the model that was pruned."""
    from pumice.report import disk_bytes

    path = Path(source).expanduser()
    facts: dict[str, Any] = {"name": name or path.name.removesuffix(".gguf"), "source": str(source)}
    if path.exists():
        facts |= {"source": str(path.resolve()), "input_bytes": disk_bytes(path)}
        facts["input_format"] = "GGUF" if path.suffix == ".gguf" else "safetensors"
    return facts


def dense_disk_bytes(folder: str | Path) -> int:
    """Bytes that the weight files of a Pumice checkpoint would have if every weight were stored dense."""
    from pumice.engine.store import read_config
    from pumice.report import disk_bytes
    from pumice.weights.layouts.base import Packed

    layers = read_config(folder)["quantization_config"]["layers"]
    stored = [Packed.empty(entry) for entry in layers.values()]
    return disk_bytes(folder) + sum(packed.dense_nbytes - packed.nbytes for packed in stored)


def pruned_run(
    result: Any,
    out: str | Path,
    *,
    source: str | Path,
    plan: Mapping[str, Any] | None = None,
    recipe: Any = None,
    command: str = "",
) -> Run:
    """The record of a pruning that wrote the checkpoint `out`: sizes, layers and what was kept, nothing measured yet.

    `result`: PruneResult; `plan`: what `plan_prune` said, for the layers that stay dense; `recipe`: a `Recipe`.
    """
    from pumice.report import disk_bytes

    found = result.to_dict()
    about = recipe.to_dict() if recipe is not None else {}
    facts = {**found["recipe"], **{name: about[name] for name in ("summary", "paper") if name in about}}
    run = Run(
        command=command,
        title=f"{found['recipe']['name']}, {100 * found['density']:.0f} %",
        model=model_facts(source),
        recipe=facts,
        prune=found,
        columns=[
            Column("dense", density=1.0, disk_bytes=dense_disk_bytes(out)),
            Column("sparse", density=found["density"], disk_bytes=disk_bytes(out)),
        ],
        kept=list((plan or {}).get("kept", [])),
    )
    return stamp(run)


def measure_run(
    run: Run,
    dense: nn.Module,
    sparse: nn.Module,
    tokenizer: Any,
    *,
    data: Any = None,
    tasks: Sequence[str] = (),
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    seqlen: int = 1024,
    max_windows: int | None = None,
    batch: Sequence[int] = (1,),
    repeats: int = 5,
    prompts: Sequence[str] = (),
    compute: str = "auto",
    best_dense: bool = False,
    progress: bool = True,
) -> Run:
    """Evaluate, pack, time and hear both models, and put it all into the run's two columns; returns the run.

    `sparse` is packed in place. What a kind of model cannot give (no logits, no prompts) becomes a note. With
    `best_dense` a copy of the dense model, packed too, is timed as a third column between the two: what a better dense
    backend alone would give must not be taken for the gain of sparsity.
    """
    dense_column, sparse_column = _columns(run, dense, sparse)
    options: dict[str, Any] = {"data": data, "tasks": tasks, "tasks_dir": tasks_dir, "seqlen": seqlen}
    options["limit"] = limit
    options |= {"max_windows": max_windows, "compute": compute, "progress": progress, "tokenizer": tokenizer}
    _quality(run, dense, sparse, dense_column, sparse_column, options)
    _speed(run, dense, sparse, tokenizer, batch, repeats, best_dense, progress)
    _sentences(run, dense, sparse, tokenizer, prompts)
    if len(run.columns) > 2:
        run.columns.insert(1, run.columns.pop())
    run.notes = list(dict.fromkeys(run.notes))
    return stamp(run)


def _columns(run: Run, dense: nn.Module, sparse: nn.Module) -> tuple[Column, Column]:
    first = run.denses[0] if run.denses else Column("dense", density=1.0)
    last = run.sparses[-1] if run.sparses else Column("sparse", density=run.prune.get("density"))
    run.columns = [first, last]
    for column, model in zip(run.columns, (dense, sparse), strict=True):
        dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()), "")
        base = column.name.split(" ")[0]
        column.name = f"{base} {SHORT.get(dtype, dtype)}".strip()
    return run.columns[0], run.columns[1]


def _quality(
    run: Run, dense: nn.Module, sparse: nn.Module, dense_column: Column, sparse_column: Column, options: dict[str, Any]
) -> None:
    from pumice.engine.evaluate import evaluate

    try:
        judged = evaluate(sparse, dense=dense, **options)
        sparse_column.add_quality(judged)
        run.notes += judged.notes
        # Alone a model without logits or labels gives nothing to measure, beside dense it does.
        if any(value is not None for value in (judged.perplexity, judged.accuracy, judged.retrieval)):
            dense_column.add_quality(evaluate(dense, **options))
    except PumiceError as error:
        run.notes.append(f"quality was not measured: {error}")


def _speed(
    run: Run,
    dense: nn.Module,
    sparse: nn.Module,
    tokenizer: Any,
    batch: Sequence[int],
    repeats: int,
    best_dense: bool,
    progress: bool,
) -> None:
    from pumice.engine.bench import bench, rows_of
    from pumice.engine.models import context_length
    from pumice.engine.pack import describe, pack

    room = context_length(dense) or sys.maxsize
    lengths = {"prompt_tokens": min(128, room // 2), "new_tokens": min(32, max(room // 4, 1))}
    rows = rows_of(dense, batch, lengths["prompt_tokens"])
    models = {"dense": dense, "sparse": pack(sparse, batch=rows, progress=progress)}
    if best_dense:
        models["packed"] = pack(copy.deepcopy(dense), batch=rows, progress=progress)
        run.columns.append(replace(run.columns[0], name=f"{run.columns[0].name}, packed", tasks={}))
    run.packed = [{k: v for k, v in layer.items() if k != "timings"} for layer in describe(sparse).to_dict()["layers"]]
    try:
        timed = bench(models, against=None, batch=batch, repeats=repeats, tokenizer=tokenizer, **lengths)
    except PumiceError as error:
        run.notes.append(f"speed was not measured: {error}")
        return
    run.bench = timed.settings
    for column, (name, model) in zip(run.columns, models.items(), strict=True):
        column.add_speed(timed, name)
        if column.memory_bytes is not None:
            column.memory_bytes += describe(model).copies


def _sentences(run: Run, dense: nn.Module, sparse: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> None:
    from pumice.engine.generate import generate
    from pumice.engine.models import model_kind

    if tokenizer is None or model_kind(dense) != "causal-lm":
        return
    asked = list(prompts) or [
        "Why is the sky blue?" if getattr(tokenizer, "chat_template", None) else "Once upon a time"
    ]
    run.generations = [
        Sentences(
            prompt,
            {
                column.name: generate(model, tokenizer, prompt, NEW_TOKENS).text
                for column, model in zip(run.columns[:2], (dense, sparse), strict=True)
            },
        )
        for prompt in asked
    ]
