"""Commands that measure and run models: eval, bench, pack, generate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pumice.cli.console import Output, command, names, numbers, table
from pumice.cli.make import Device, Dtype, Model
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from rich.console import Console

    from pumice.engine.models import LoadedModel

Threads = Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's own choice.")]
Compute = Annotated[str, typer.Option(help="auto, or bf16 for bfloat16 matrix products on a float32 model.")]


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    command(app, "eval")(evaluate)
    command(app, "bench")(bench)
    command(app, "pack")(pack)
    command(app, "generate")(generate)


def _load(model: str, device: str, dtype: str) -> LoadedModel:
    from pumice.engine.models import load_model

    return load_model(model, device=device, dtype=dtype)


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise PumiceError(f"threads={threads} must be at least 1.")
    import torch

    torch.set_num_threads(threads)


def evaluate(
    model: Model,
    *,
    data: Annotated[
        str | None,
        typer.Option(help="Text file or dataset, or a folder in Cranfield's format; default: Python's text."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Zero-shot tasks: .jsonl files, names in --tasks-dir, or lm-eval's.")
    ] = None,
    tasks_dir: Annotated[Path | None, typer.Option(help="Folder of .jsonl tasks.")] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens in each window.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Most windows; default: the whole text.")] = None,
    limit: Annotated[int | None, typer.Option(help="Most questions of each task.")] = None,
    against: Annotated[str | None, typer.Option(help="The dense model, to measure agreement with it.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at once.")] = 1,
    compute: Compute = "auto",
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> Output:
    """Quality: perplexity, zero-shot tasks, retrieval, agreement with a dense model."""
    from pumice.engine.evaluate import evaluate as run_evaluate

    loaded = _load(model, device, dtype)
    dense = _load(against, device, dtype).model if against is not None else None
    result = run_evaluate(
        loaded.model,
        data=data,
        tasks=names(tasks),
        tasks_dir=tasks_dir,
        seqlen=seqlen,
        tokenizer=loaded.tokenizer,
        dense=dense,
        max_windows=max_windows,
        limit=limit,
        batch_size=batch_size,
        compute=compute,
    )
    found = {"model": model, **result.to_dict()}
    return Output(found, lambda console: _show_quality(console, found))


def _show_quality(console: Console, found: dict[str, Any]) -> None:
    rows: list[tuple[str, str]] = []
    if found["perplexity"] is not None:
        protocol = f"{found['windows']} windows of {found['seqlen']} tokens"
        rows.append((f"perplexity ({protocol})", f"{found['perplexity']:,.3f}"))
    for name, value in (found["agreement"] or {}).items():
        if value is not None and name != "count":
            rows.append((f"agreement with dense: {name}", f"{value:.4f}"))
    if found["accuracy"] is not None:
        rows.append(("top-1 accuracy", f"{found['accuracy']:.4f}"))
    rows += [(f"retrieval {name}", f"{value:.4f}") for name, value in (found["retrieval"] or {}).items()]
    for task, scores in found["tasks"].items():
        shown = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in scores.items()
        )
        rows.append((task, ", ".join(shown)))
    console.print(table(("measure", found["model"]), rows))
    for note in found["notes"]:
        console.print(f"note: {note}", markup=False)


def bench(
    model: Model,
    *,
    against: Annotated[str, typer.Option(help="dense (this model unpacked), another model, or none.")] = "dense",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,16",
    threads: Threads = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds; the median counts.")] = 5,
    packed: Annotated[bool, typer.Option("--pack/--no-pack", help="First choose each layer's fastest form.")] = True,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> Output:
    """Speed: prefill and decode beside dense, in turns, medians."""
    from pumice.engine.bench import bench as run_bench
    from pumice.engine.bench import rows_of
    from pumice.engine.pack import pack as run_pack
    from pumice.engine.pack import unpack

    _set_threads(threads)
    sizes = numbers(batch, "batch")
    loaded = _load(model, device, dtype)
    models: dict[str, Any] = {}
    if against == "dense":
        models["dense"] = unpack(copy.deepcopy(loaded.model))
    elif against != "none":
        models["dense"] = _load(against, device, dtype).model
    rows = rows_of(loaded.model, sizes, prompt_tokens)
    if packed and "dense" in models:
        # What a better dense product and fewer calls give is not sold as sparsity.
        models["dense, packed"] = run_pack(copy.deepcopy(models["dense"]), batch=rows)
    models["sparse"] = run_pack(loaded.model, batch=rows) if packed else loaded.model
    result = run_bench(
        models,
        against=None,
        batch=sizes,
        threads=threads,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        tokenizer=loaded.tokenizer,
    )
    found = {"model": model, **result.to_dict()}
    return Output(found, lambda console: _show_bench(console, found))


def _show_bench(console: Console, found: dict[str, Any]) -> None:
    from pumice.analyze.summary import EQUAL, number, size_text

    rows, slower = [], []
    for row in found["rows"]:
        cells = [row["name"], str(row["batch"])]
        for kind in ("prefill", "decode", "forward"):
            if row[kind] is None:
                cells.append("–")
                continue
            ratio = row["ratios"].get(kind)
            beside = "" if ratio is None or row["name"] == "dense" else f" ({ratio:.2f}×)"
            cells.append(f"{number(row[kind])}{beside}")
            if row["name"] == "sparse" and ratio is not None and ratio < 1 - EQUAL:
                slower.append(f"{kind} at batch {row['batch']}")
        rows.append((*cells, size_text(found["bytes"][row["name"]])))
    heads = ("model", "batch", "prefill tokens/s", "decode tokens/s", "forward /s", "in memory")
    console.print(table(heads, rows, right=range(1, 6)))
    console.print(f"{found['settings']['threads']} threads, medians of {found['settings']['repeats']} rounds in turns.")
    if slower:
        console.print(f"Dense wins here: {', '.join(slower)}.")


def pack(
    model: Model,
    *,
    batch: Annotated[str, typer.Option(help="Rows to choose for, separated by commas.")] = "1,16",
    threads: Threads = None,
    values: Annotated[
        str | None, typer.Option(help="Change the type first (bfloat16, float16, float32), or round: int8, int4.")
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="int8: what goes into layers of int8 may be rounded to eight bits a row.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="One line per layer instead of one per kind of layer.")] = False,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Time again what was timed here before.")] = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> Output:
    """What would run here: per layer dense or sparse, by which kernel, timed, with reasons. Writes nothing."""
    from pumice.engine.pack import describe
    from pumice.engine.pack import pack as run_pack

    _set_threads(threads)
    loaded = _load(model, device, dtype)
    rows = numbers(batch, "batch")
    packed = run_pack(loaded.model, batch=rows, values=values, activations=activations, remeasure=remeasure)
    found = describe(packed).to_dict()
    return Output({"model": model, **found}, lambda console: _show_pack(console, found, every))


def _show_pack(console: Console, found: dict[str, Any], every: bool) -> None:
    from pumice.analyze.summary import packed_groups, percent, size_text

    groups = packed_groups(found["layers"])
    if every:
        groups = [group for layer in found["layers"] for group in packed_groups([layer])]
    rows = []
    for group in groups:
        count = len(group["layers"])
        rows.append(
            (
                group["layers"][0] if count == 1 else f"{count} like {group['layers'][0]}",
                "×".join(map(str, group["shape"])),
                percent(group["density"]),
                group["layout"],
                " ".join(f"{rows_}:{name}" for rows_, name in group["backends"].items()),
                " / ".join(f"{value:.3f}" for value in group["ms"].values()),
                " / ".join(f"{value:.3f}" for value in group["dense_ms"].values()),
                group["reason"],
            )
        )
    heads = ("layers", "shape", "density", "layout", "kernel by rows", "ms", "dense ms", "why")
    console.print(table(heads, rows, right=(2, 5, 6)))
    console.print(f"In memory: {size_text(found['bytes'])}, dense {size_text(found['dense_bytes'])}.")


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to continue or answer.")],
    *,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Use the chat template where there is one.")] = True,
    packed: Annotated[bool, typer.Option("--pack/--no-pack", help="First choose each layer's fastest form.")] = False,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> Output:
    """Text from a model."""
    from pumice.engine.generate import generate as run_generate

    _set_threads(threads)
    loaded = _load(model, device, dtype)
    net = loaded.model
    if packed:
        from pumice.engine.pack import pack as run_pack

        net = run_pack(net)
    tokenizer = loaded.need_tokenizer()
    result = run_generate(net, tokenizer, prompt, max_new_tokens, chat=chat, temperature=temperature, seed=seed)

    def show(console: Console) -> None:
        console.print(result.text, markup=False, soft_wrap=True)
        if result.tokens_per_second is not None:
            speed = f"{result.new_tokens} tokens, {result.tokens_per_second:.1f} a second"
            print(speed, file=_stderr())

    return Output({"model": model, "prompt": prompt, **result.to_dict()}, show)


def _stderr() -> Any:
    import sys

    return sys.stderr
