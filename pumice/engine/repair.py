"""`pumice.repair`: make a pruned model better without touching which weights are zero."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.core.registry import Bound
from pumice.core.view import find_views
from pumice.engine.data import is_text, load_text, make_data
from pumice.engine.files import check_free
from pumice.engine.models import load_model
from pumice.engine.plan import compute_dtype
from pumice.engine.store import save
from pumice.prune.repair.base import Clock, Job
from pumice.prune.run import peak_memory_bytes
from pumice.weights.grid import keep, zeros_of
from pumice.weights.grid import kept as grid_kept
from pumice.weights.modules import densify

Spec = str | Mapping[str, Any]
HELD_OUT = 16
"""One in so many batches, and at most so many, judge a repair."""


@dataclass
class RepairStep:
    """What one repair did; `facts` are the method's own (steps, layers, parameters trained, ...)."""

    method: dict[str, Any]
    before: float
    after: float
    kept: bool
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class RepairResult:
    """Held-out loss before and after, of each repair and of all; a repair that made it worse was undone."""

    before: float
    after: float
    density: float
    steps: list[RepairStep]
    seconds: float
    peak_memory_bytes: int
    notes: list[str] = field(default_factory=list)
    path: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def repair(
    model: nn.Module | str | Path,
    method: Spec | Bound | Sequence[Spec | Bound] = "perp",
    *,
    data: Any = None,
    teacher: nn.Module | str | Path | None = None,
    minutes: float | None = None,
    out: str | Path | None = None,
    tokenizer: Any = None,
    samples: int = 256,
    seqlen: int = 1024,
    seed: int = 0,
    compute: str = "auto",
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = True,
) -> RepairResult:
    """Retrain or refit what a pruned model has left, in place; its zeros stay zeros.

    A sixteenth of the data (the end of a text) is held out; a repair after which the held-out loss is no smaller is undone and the result
    says so. Weights are float32 while they are repaired. Sparse layers come back as ordinary ones with zeros (`pumice.pack`
    or `pumice.save` make them small again).

    Args:
        model: a pruned module (changed in place), or a checkpoint by name (then `out` is required).
        method: a repair (`pumice methods repair`), `{"name": …, option: …}`, or several to be done one after the other.
        data: as `pumice.prune` takes it; what the model is trained on.
        teacher: the dense model, which refits need and training is guided by.
        minutes: time for all the methods together; None takes each method's own.
        samples, seqlen: windows of text, and their length in tokens.
        out: folder to write the repaired checkpoint to.

    Raises:
        PumiceError: whatever can be known to fail is refused before any work.
    """
    methods = bind_repairs(method)
    if minutes is not None and not minutes > 0:
        raise PumiceError(f"minutes={minutes!r} must be above zero.")
    if out is not None and not overwrite:
        check_free(Path(out))
    if not isinstance(model, nn.Module):
        if out is None:
            raise PumiceError(
                f"out=None: model {str(model)!r} is given by name; say where the repaired checkpoint goes."
            )
        loaded = load_model(model, device=device)
        net, tokenizer = loaded.model, tokenizer or loaded.tokenizer
    else:
        net = model
    guide = load_model(teacher, device=device).model if isinstance(teacher, str | Path) else teacher
    start = time.perf_counter()
    session = _Session(net, guide, methods, loss, seed, progress)
    learn, held_out = _data(net, tokenizer, data, {"samples": samples, "seqlen": seqlen, "seed": seed})
    result = session.run(learn, held_out, minutes, compute)
    result.seconds = time.perf_counter() - start
    if out is not None:
        metadata = {**_metadata(net), "repair": [step.method for step in result.steps if step.kept]}
        result.path = str(save(net, out, overwrite=overwrite, tokenizer=tokenizer, metadata=metadata))
    return result


def bind_repairs(method: Spec | Bound | Sequence[Spec | Bound]) -> list[Bound]:
    """One repair or several, looked up; PumiceError for an unknown one or an option that it does not have."""
    given = [method] if isinstance(method, str | Mapping | Bound) else list(method)
    if not given:
        raise PumiceError("method=[] names no repair: `pumice methods repair` lists them.")
    return [one if isinstance(one, Bound) else registry.repair.bind(one) for one in given]


def _metadata(model: nn.Module) -> dict[str, Any]:
    """What a Pumice checkpoint says of how it was made, where the model came from one."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    stored = getattr(config, "metadata", None) or {}
    return dict(stored)


def _data(model: nn.Module, tokenizer: Any, data: Any, wanted: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """What to learn from and what to be judged by: the end of a text, or the first batches of anything else."""
    if not is_text(data):
        batches = make_data(model, tokenizer, data, labels=True, **wanted)
        if len(batches) < 2:
            raise PumiceError("data holds one batch: a repair learns from some and is judged by others; give more.")
        count = max(1, min(HELD_OUT, len(batches) // HELD_OUT))
        return batches[count:], batches[:count]
    text = data if isinstance(data, list) else load_text(data)
    few = {**wanted, "samples": min(HELD_OUT, wanted["samples"])}
    try:
        # Windows overlap, so that the text is cut before they are drawn.
        first, last = _cut(text, 1 - 1 / HELD_OUT)
        return make_data(model, tokenizer, first, **wanted), make_data(model, tokenizer, last, **few)
    except PumiceError:
        first, last = _cut(text, 0.5)
        return make_data(model, tokenizer, first, **wanted), make_data(model, tokenizer, last, **few)


def _cut(text: str | list[str], share: float) -> tuple[list[str], list[str]]:
    """The first part of a text and the rest, at the end of a document or a line."""
    if isinstance(text, list):
        middle = int(len(text) * share)
        return text[:middle] or text, text[middle:]
    middle = text.rfind("\n", 0, int(len(text) * share)) + 1 or int(len(text) * share)
    return [text[:middle]], [text[middle:]]


class _Session:
    """Several repairs of one model: float32 while they run, back to its dtype afterwards, undone where they hurt."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        methods: list[Bound],
        loss: Callable[[nn.Module, Any], Tensor] | None,
        seed: int,
        progress: bool,
    ) -> None:
        self.model, self.teacher, self.methods = densify(model), teacher, methods
        self.loss, self.seed, self.progress = loss, seed, progress
        if self.model is not model:
            raise PumiceError("model is a single sparse layer: put it into a module first.")
        self.views = [view for view in find_views(model) if bool((view.matrix() == 0).any())]
        if not self.views:
            raise PumiceError(f"model {type(model).__name__} has no zeros in its layers: prune it first.")
        if teacher is not None:
            teacher.eval().requires_grad_(False)

    def run(self, learn: list[Any], held_out: list[Any], minutes: float | None, compute: str) -> RepairResult:
        dtypes = {name: tensor.dtype for name, tensor in self._floats()}
        products = compute_dtype(compute, self.model)
        # Not `model.float()`: Transformers refuses that for a model that came from a sparse checkpoint.
        for _, tensor in self._floats():
            tensor.data = tensor.data.float()
        job = Job(
            self.views,
            learn,
            held_out,
            self.teacher,
            self.loss,
            compute=products,
            seed=self.seed,
            progress=self.progress,
        )
        zeros = sum(int((view.matrix() == 0).sum()) for view in self.views)
        fixed = sum(int(zeros_of(view).sum()) for view in self.views)
        try:
            steps = self._steps(job, minutes)
        finally:
            for name, tensor in self._floats():
                tensor.data = tensor.data.to(dtypes[name])
        total = sum(view.numel for view in self.views)
        if sum(int(zeros_of(view).sum()) for view in self.views) < fixed:
            raise RuntimeError("a repair has changed the mask: report this")
        after = steps[-1].after if steps[-1].kept else steps[-1].before
        return RepairResult(steps[0].before, after, 1 - zeros / total, steps, 0.0, peak_memory_bytes(), job.notes)

    def _floats(self) -> list[tuple[str, Tensor]]:
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        return [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]

    def _steps(self, job: Job, minutes: float | None) -> list[RepairStep]:
        whole, steps = Clock(minutes), []
        before = job.held_out_loss(self.model)
        for index, method in enumerate(self.methods):
            left = None if minutes is None else max(minutes * (1 - whole.used), 0.01)
            job.clock = Clock(method.info.extras["minutes"] if left is None else left)
            saved = {name: tensor.detach().clone() for name, tensor in self._floats()}
            grids = {view.name: grid_kept([view]) for view in self.views}
            facts = self._guarded(method, job, saved)
            after = job.held_out_loss(self.model)
            better = after < before
            if not better:
                self._restore(saved)
                for view in self.views:
                    keep(view, grids[view.name])
                job.notes.append(
                    f"{method.name}: the held-out loss would go from {before:.4f} to {after:.4f}, so that it was undone"
                )
            self._leave_grids(method.name, job)
            steps.append(RepairStep(method.describe(), before, after, better, job.clock.seconds, facts))
            before = after if better else before
            if minutes is not None and whole.used >= 1 and index + 1 < len(self.methods):
                skipped = ", ".join(one.name for one in self.methods[index + 1 :])
                job.notes.append(f"the time was up before {skipped}; give more minutes")
                break
        return steps

    def _leave_grids(self, name: str, job: Job) -> None:
        """Layers of integers whose weights a repair moved are floating point from now on, and the user is told."""
        moved = [
            view for view in self.views if (grid := grid_kept([view])) is not None and not grid.belongs(view.matrix())
        ]
        for view in moved:
            keep(view, None)
        if moved:
            job.notes.append(
                f"{name}: {len(moved)} layers were integers and no longer are; quantise after this repair, or repair "
                "integers with bqpo and oqp"
            )

    def _guarded(self, method: Bound, job: Job, saved: dict[str, Tensor]) -> dict[str, Any]:
        """Run one repair; an error or an interruption leaves the model as it was."""
        try:
            return method(self.model, job) or {}
        except BaseException:
            self._restore(saved)
            raise

    @torch.no_grad()
    def _restore(self, saved: dict[str, Tensor]) -> None:
        for name, tensor in self._floats():
            tensor.copy_(saved[name])
