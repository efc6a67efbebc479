"""`pumice.prune`: one-shot pruning of a model in memory, or of a checkpoint from disk to disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.stream import InMemory, Source, Unit, find_units
from pumice.core.view import DEFAULT_IGNORE, find_views
from pumice.engine.data import make_data
from pumice.engine.disk import DiskSource, Unfinished, load_rest, open_on_disk
from pumice.engine.layer_cost import linear_milliseconds
from pumice.engine.models import load_model, load_tokenizer
from pumice.engine.plan import DryRun, compute_dtype, plan_run
from pumice.engine.repair import bind_repairs
from pumice.engine.repair import repair as run_repair
from pumice.engine.store import model_config, save_companions, tied_parameters
from pumice.engine.writer import Writer
from pumice.prune.axes import Axes
from pumice.prune.run import LayerResult, Pruner, PruneResult
from pumice.recipe import AXES, PLACEMENT, Recipe, find, resolve
from pumice.weights.grid import forget
from pumice.weights.patterns.base import Pattern

RUN_DEFAULTS = {"seed": 0, "samples": 64, "seqlen": 1024, "data": None, "compute": "auto"}


def prune(
    model: nn.Module | str | Path,
    method: str | Path | Recipe = "auto",
    *,
    density: float | None = None,
    pattern: str | Pattern | None = None,
    data: Any = None,
    out: str | Path | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = DEFAULT_IGNORE,
    seed: int | None = None,
    score: Any = None,
    recover: Any = None,
    allocation: Any = None,
    goal: Any = None,
    values: Any = None,
    sequential: bool | None = None,
    tokenizer: Any = None,
    samples: int | None = None,
    seqlen: int | None = None,
    compute: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    repair: Any = None,
    minutes: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> PruneResult:
    """Prune a model in place, or a checkpoint into the folder `out`, block by block.

    Args:
        model: any module (changed in place), or a Hugging Face id, folder or GGUF file (then `out` is required; a
            folder of safetensors is streamed, so that it may be larger than memory).
        method: a recipe or score (`pumice methods` lists them), a recipe's YAML file, or a `Recipe`; what is given
            below overrides what it says.
        density: share of the weights of each pruned layer to keep; N:M patterns imply theirs.
        pattern: "unstructured", "2:4", "16x32", "row", "column", …
        data: calibration data: text file, Hugging Face dataset, token ids, batches or a DataLoader; None takes a text
            that every Python has.
        targets, ignore: patterns of layer names to prune, to leave dense.
        score, recover, allocation, goal, values: names, or `{"name": …, option: …}`.
        sequential: inside a block too, calibrate each layer on what the pruned ones before it give (slower).
        samples, seqlen: calibration windows (64) and their length in tokens (1024, or the model's context).
        compute: "float32", or "bfloat16" matrix products while calibrating; "auto" (the default) takes bfloat16 for
            models of 50 million parameters and more where the machine multiplies it natively.
        device, dtype: where and in which type a `model` given by name is loaded.
        loss: `f(model, batch)` for gradient scores of models that return no loss.
        repair, minutes: repairs to do afterwards with the dense model as teacher, and the time for them (`pumice.repair`,
            on the same data).
        resume: go on with an interrupted run to the same `out`.
        overwrite: replace an existing `out`.

    Returns:
        density, error and time of every layer.

    Raises:
        PumiceError: whatever can be known to fail is refused before any work; an interrupted run keeps its finished
            blocks in `OUT.partial`.
    """
    axes = Axes.make(
        **resolve(
            method,
            score=score,
            recover=recover,
            allocation=allocation,
            goal=goal,
            values=values,
            sequential=sequential,
            pattern=pattern,
            density=density,
            targets=targets,
            ignore=ignore,
        )
    )
    given = {"seed": seed, "samples": samples, "seqlen": seqlen, "data": data, "compute": compute}
    settings = {**RUN_DEFAULTS, **find(method).run(), **{k: v for k, v in given.items() if v is not None}}
    data, products = settings.pop("data"), str(settings.pop("compute"))
    settings["data"] = _name_of(data)
    repairs = bind_repairs(repair) if repair else []
    job = _Job(axes, settings, out, tokenizer, data, products, loss, resume, overwrite, progress)
    teacher: Any = copy.deepcopy(model) if repairs and isinstance(model, nn.Module) else model
    if isinstance(model, nn.Module):
        result = job.in_memory(model, getattr(model, "name_or_path", "") or type(model).__name__)
    elif out is None:
        raise PumiceError(f"out=None: model {str(model)!r} is given by name; say where the pruned checkpoint goes.")
    else:
        result = job.from_name(model, device, dtype)
    if repairs:
        subject: Any = model if isinstance(model, nn.Module) else out
        # What was written before the repair is replaced by what it makes of it.
        options: dict[str, Any] = {"out": out, "overwrite": True, "tokenizer": job.tokenizer, "loss": loss}
        options |= {"compute": products, "progress": progress, "seed": int(settings["seed"]), "device": device}
        done = run_repair(subject, repairs, data=data, teacher=teacher, minutes=minutes, **options)
        result.repair = done.to_dict()
    return result


def plan_prune(
    model: nn.Module | str | Path,
    method: Any = "auto",
    *,
    samples: int = 64,
    seqlen: int = 1024,
    compute: str = "auto",
    **given: Any,
) -> DryRun:
    """What `prune` with the same arguments would prune and keep, and about how much time, memory and disk it takes.

    Reads no weights of a model given by name. Raises PumiceError as `prune` would, for what is known beforehand.
    """
    axes = {name: given[name] for name in (*AXES, *PLACEMENT) if name in given}
    return plan_run(model, Axes.make(**resolve(method, **axes)), samples, seqlen, compute)


def _name_of(data: Any) -> str | None:
    return (
        data if data is None or isinstance(data, str) else str(data) if isinstance(data, Path) else type(data).__name__
    )


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that is not as it was, with both values; settings inside a recipe as `recipe.density`."""
    for key, value in now.items():
        then = before.get(key)
        if isinstance(then, dict) and isinstance(value, dict):
            inside = _difference(then, value)
            if inside is not None:
                return f"{key}.{inside[0]}", *inside[1:]
        elif then != value:
            return key, then, value
    return None


class _Job:
    """One pruning run: its data, its checkpoint, and what an earlier, interrupted run left."""

    def __init__(
        self,
        axes: Axes,
        settings: dict[str, Any],
        out: str | Path | None,
        tokenizer: Any,
        data: Any,
        compute: str,
        loss: Callable[[nn.Module, Any], Tensor] | None,
        resume: bool,
        overwrite: bool,
        progress: bool,
    ) -> None:
        self.axes, self.settings, self.out, self.tokenizer, self.data = axes, settings, out, tokenizer, data
        self.compute, self.loss, self.resume, self.overwrite, self.progress = compute, loss, resume, overwrite, progress
        if resume and out is None:
            raise PumiceError("resume=True needs out=…, the folder of the interrupted run.")

    def batches(self, model: nn.Module) -> list[Any]:
        """Calibration batches, or none where nothing needs them and none were given."""
        if not self.axes.needs_data and self.data is None:
            return []
        wanted = {key: self.settings[key] for key in ("samples", "seqlen", "seed")}
        batches = make_data(model, self.tokenizer, self.data, labels=True, **wanted)
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        return [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]

    def in_memory(self, model: nn.Module, source: str) -> PruneResult:
        """Prune a module in place; with `out`, each finished block is written at once."""
        if self.out is None:
            return self._pruner(model, self.batches(model)).run()
        views = find_views(model, self.axes.targets, self.axes.ignore)
        self.axes.check_views(views)
        with self._writer(model, source) as writer:
            return self._run(model, writer, InMemory())

    def from_name(self, name: str | Path, device: str, dtype: str) -> PruneResult:
        """Prune a model given by name: streamed from disk where that is possible, else loaded."""
        whole = self.axes.whole_model
        if (device, dtype) != ("cpu", "auto"):
            whole = "a device or dtype was asked for"
        opened = whole or open_on_disk(name)
        if isinstance(opened, str):
            loaded = load_model(name, dtype=dtype, device=device)
            self.tokenizer = self.tokenizer or loaded.tokenizer
            result = self.in_memory(loaded.model, str(name))
            result.notes.append(f"the model was loaded whole: {opened}")
            return result
        model, shards, names, path = opened
        self.tokenizer = self.tokenizer or load_tokenizer(path)
        views = find_views(model, self.axes.targets, self.axes.ignore)
        self.axes.check_views(views)
        units = {unit.name for unit in find_units(model, views)}
        with self._writer(model, str(name)) as writer:
            load_rest(model, shards, names, units)
            source = DiskSource(model, shards, names, writer)
            return self._run(model, writer, source)

    def _writer(self, model: nn.Module, source: str) -> Writer:
        assert self.out is not None
        options: dict[str, Any] = {"hint": self.axes.pattern, "tied": tied_parameters(model)}
        self.fingerprint = {"model": source, "recipe": self.axes.describe(), **self.settings}
        if not self.resume:
            return Writer(self.out, self.overwrite, **options)
        writer = Writer.resume(self.out, self.overwrite, **options)
        before = writer.progress.get("fingerprint", {})
        changed = _difference(before, self.fingerprint)
        if changed is not None:
            key, then, now = changed
            raise PumiceError(
                f"resume: the interrupted run in {writer.partial} had {key}={then!r}, now it is {now!r}; "
                "repeat its settings, or start again with overwrite."
            )
        return writer

    @staticmethod
    def _finished(writer: Writer) -> dict[str, list[LayerResult]]:
        stored = writer.progress.get("results", {})
        return {name: [_layer_result(row) for row in stored[name]] for name in writer.done if name in stored}

    def _run(self, model: nn.Module, writer: Writer, source: Source) -> PruneResult:
        done = self._finished(writer)
        results = {name: [asdict(row) for row in rows] for name, rows in done.items()}

        def finished(unit: Unit, rows: list[LayerResult]) -> None:
            results[unit.name] = [asdict(row) for row in rows]
            writer.add_module(unit.name, unit.module)
            if not isinstance(source, InMemory):
                forget(unit.module)
            writer.commit(fingerprint=self.fingerprint, results=results, densities=pruner.densities)

        before = writer.progress.get("densities")
        pruner = self._pruner(model, self.batches(model), source=source, finished=finished, done=done, densities=before)
        pruner.measure_dense()
        if isinstance(source, InMemory):
            pruner.source = Unfinished(model, writer)
            if "drift" not in pruner.layer_needs:
                for name in done:
                    pruner.source.load(name, model.get_submodule(name))
        result = pruner.run()
        for name, module in model.named_modules():
            if not any(name == unit or name.startswith(f"{unit}.") for unit in writer.done):
                writer.add_own(name, module)
        with writer.guarded("the tokenizer"):
            save_companions(writer.partial, model, self.tokenizer)
        metadata = {**self.fingerprint, "density": result.density, "seconds": result.seconds}
        result.path = str(writer.finish(model_config(model), metadata=metadata))
        return result

    def _pruner(self, model: nn.Module, batches: list[Any], **options: Any) -> Pruner:
        return Pruner(
            model,
            self.axes,
            batches,
            compute=compute_dtype(self.compute, model),
            loss=self.loss,
            seed=self.settings["seed"],
            progress=self.progress,
            costs={"ms": linear_milliseconds},
            **options,
        )


def _layer_result(row: dict[str, Any]) -> LayerResult:
    return LayerResult(**{**row, "shape": tuple(row["shape"])})
