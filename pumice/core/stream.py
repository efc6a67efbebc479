"""Block-by-block walk of a model: each block is fed by the already changed blocks before it.

Memory is one block plus the cached activations, if a `Source` loads blocks on demand. A model is cut into *units*
(the blocks of its module lists, and prunable layers outside them) in the order in which a probe batch runs them.
Consecutive units whose output is simply the next one's input form a *segment*: its activations are handed from unit to
unit. Where a segment ends (another stack, a pooling, a branch), the next one's inputs come from a full forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pumice.core.calls import (
    CallRecord,
    call_model,
    hidden_of,
    leaves,
    like,
    record_of,
    same,
    tensors,
    version,
)
from pumice.core.collect import Collect, Entries, Twin
from pumice.core.errors import PumiceError
from pumice.core.precision import products
from pumice.core.stats import EndOfPass, evaluating
from pumice.core.view import WeightView


class Source(Protocol):
    """Where the weights of a unit live between its turns; `original` asks for them as they were before any pruning."""

    def load(self, name: str, module: nn.Module, original: bool = False) -> None: ...
    def free(self, name: str, module: nn.Module) -> None: ...


class InMemory:
    """The model is all there: nothing to load or free."""

    def load(self, name: str, module: nn.Module, original: bool = False) -> None:
        del name, module, original

    def free(self, name: str, module: nn.Module) -> None:
        del name, module


@dataclass
class Unit:
    """A part of the model that is changed in one go."""

    name: str
    module: nn.Module = field(repr=False)
    views: list[WeightView] = field(default_factory=list, repr=False)
    chained: bool = False
    """Its hidden state is exactly what the unit before it returned."""


def block_lists(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children of the outermost module lists and sequentials: the blocks."""

    def blocks(prefix: str, container: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for index, block in container.named_children():
            # A list of lists cannot be called itself, so the blocks lie deeper.
            deeper = isinstance(block, nn.ModuleList | nn.ModuleDict)
            yield from blocks(f"{prefix}{index}.", block) if deeper else [(f"{prefix}{index}", block)]

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            inside = blocks if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 0 else walk
            yield from inside(f"{prefix}{name}.", child)

    return (blocks if isinstance(model, nn.ModuleList | nn.Sequential) else walk)("", model)


def find_units(model: nn.Module, views: Sequence[WeightView]) -> list[Unit]:
    """Units that hold all the views, in module order (the probe puts them into the order of execution)."""
    blocks = dict(block_lists(model))
    units: dict[str, Unit] = {}
    for view in views:
        owner = next((n for n in blocks if view.module_name == n or view.module_name.startswith(f"{n}.")), None)
        name, module = (view.module_name, view.module) if owner is None else (owner, blocks[owner])
        units.setdefault(name, Unit(name, module)).views.append(view)
    return list(units.values())


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Visit = Callable[[Unit, Collect], None]


class Stream:
    """Walks `model` over calibration `batches`, unit by unit.

    Args:
        compute: dtype of the matrix products of the forward passes: float32, or bfloat16 (autocast; the residual
            stream stays in the model's dtype).
        dense: keep the dense model's activations beside the changed one's, for the statistic "drift".
    """

    def __init__(
        self,
        model: nn.Module,
        views: Sequence[WeightView],
        batches: Sequence[Any],
        *,
        compute: torch.dtype = torch.float32,
        source: Source | None = None,
        dense: bool = False,
    ) -> None:
        if not batches:
            raise PumiceError("data is empty: the method needs at least one calibration batch.")
        self.model, self.batches, self.compute = model, list(batches), compute
        self.source: Source = source or InMemory()
        self.dense = dense
        self.unpaired: set[str] = set()
        self.device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        self._repeated: set[str] = set()
        self._wrapping: dict[str, Any] = {}
        with self._running():
            self.units = self._probe(find_units(model, views))
            self._verify()
        reached = {unit.name for unit in self.units}
        self.unreached = [unit for unit in find_units(model, views) if unit.name not in reached]

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Forward passes as calibration wants them: eval mode, no gradients, one expert after the other."""
        config = getattr(self.model, "config", None)
        experts = getattr(config, "_experts_implementation", None)
        if experts is not None:
            config._experts_implementation = "eager"  # type: ignore[union-attr]
        with torch.no_grad(), evaluating(self.model):
            try:
                yield
            finally:
                if experts is not None:
                    config._experts_implementation = experts  # type: ignore[union-attr]

    def precision(self) -> AbstractContextManager[None]:
        """How forward passes compute."""
        return products(self.device.type, self.compute)

    def _loading(self, units: Sequence[Unit], original: bool) -> list[Any]:
        handles = []
        for unit in units:

            def before(module: nn.Module, args: Any, *, name: str = unit.name) -> None:
                self.source.load(name, module, original)

            def after(module: nn.Module, args: Any, output: Any, *, name: str = unit.name) -> None:
                self.source.free(name, module)

            handles += [unit.module.register_forward_pre_hook(before), unit.module.register_forward_hook(after)]
        return handles

    def _probe(self, units: list[Unit]) -> list[Unit]:
        """Units in the order of execution, with `chained` set, from one pass of the first batch."""
        order: list[Unit] = []
        outputs: dict[int, tuple[int, bool, int]] = {}
        self._probed: dict[str, CallRecord] = {}
        keep: list[Any] = []
        calls: dict[str, int] = {}

        def before(unit: Unit) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                calls[unit.name] = calls.get(unit.name, 0) + 1
                record = record_of(args, kwargs)
                rest = record.without_hidden()
                previous = outputs.get(id(record.hidden()))
                strangers = any(id(t) in outputs for t in tensors([rest.args, rest.kwargs]))
                # A tensor that was changed in place on its way is not what the unit before returned.
                handed_on = (len(order) - 1, True, max(0, version(record.hidden())))
                unit.chained = bool(order) and previous == handed_on and not strangers
                if calls[unit.name] == 1:
                    order.append(unit)
                    self._probed[unit.name] = rest
                else:
                    unit.chained = False

            return hook

        def after(unit: Unit) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                keep.append(output)
                self._wrapping[unit.name] = like(output, torch.empty(0))
                for tensor in tensors(output):
                    outputs[id(tensor)] = (order.index(unit), tensor is hidden_of(output), version(tensor))

            return hook

        handles = self._loading(units, original=self.dense)
        for unit in units:
            handles.append(unit.module.register_forward_pre_hook(before(unit), with_kwargs=True))
            handles.append(unit.module.register_forward_hook(after(unit), with_kwargs=True))
        with _hooks(handles), self.precision():
            call_model(self.model, self.batches[0])
        repeated = {name for name, count in calls.items() if count > 1}
        for unit, following in pairwise(order):
            unit.chained &= unit.name not in repeated
            following.chained &= unit.name not in repeated and self._probed[unit.name].where is not None
        self._repeated = repeated
        return order

    def _verify(self) -> None:
        """Unchain the units whose other arguments depend on the hidden state in ways that the probe could not see."""
        for run in self.segments():
            if len(run) == 1:
                continue
            try:
                records = self._enter(run, self.batches[0], original=self.dense)
            except Exception:
                # What the model does between the units does not work on what was passed over.
                records = {}
            for unit in run[1:]:
                seen = [r.without_hidden() for r in records.get(unit.name, [])]
                truth = list(leaves([self._probed[unit.name].args, self._probed[unit.name].kwargs]))
                found = list(leaves([seen[0].args, seen[0].kwargs])) if len(seen) == 1 else []
                unit.chained = len(found) == len(truth) and all(map(same, found, truth))
        self._probed.clear()

    def segments(self) -> list[list[Unit]]:
        """Maximal runs of units that hand their hidden state on."""
        runs: list[list[Unit]] = []
        for unit in self.units:
            if unit.chained and runs:
                runs[-1].append(unit)
            else:
                runs.append([unit])
        return runs

    def _enter(self, run: list[Unit], batch: Any, original: bool = False) -> dict[str, list[CallRecord]]:
        """How one full pass calls the units of a segment; they are passed over, since only their arguments matter."""
        records: dict[str, list[CallRecord]] = {unit.name: [] for unit in run}
        originals = {unit.name: unit.module.__dict__.get("forward") for unit in run}

        def recorder(unit: Unit, true_forward: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                record = record_of(args, kwargs)
                if unit.name in self._repeated:
                    records[unit.name].append(record.with_hidden(record.hidden().clone()))
                    return true_forward(*args, **kwargs)
                records[unit.name].append(record)
                if unit is run[-1]:
                    raise EndOfPass
                return like(self._wrapping[unit.name], record.hidden())

            return forward

        outside = [unit for unit in self.units if unit not in run or unit.name in self._repeated]
        try:
            for unit in run:
                unit.module.forward = recorder(unit, unit.module.forward)  # type: ignore[method-assign]
            with _hooks(self._loading(outside, original)), self.precision():
                call_model(self.model, batch)
        except EndOfPass:
            pass
        finally:
            for unit in run:
                del unit.module.forward
                if originals[unit.name] is not None:
                    unit.module.forward = originals[unit.name]  # type: ignore[method-assign]
        return records

    def walk(self, visit: Visit) -> None:
        """Call `visit(unit, collect)` for every unit in order.

        `collect(needs)` runs the calibration data through the unit as it is and returns the statistics of its views.
        Changed by `visit` or not, the unit then feeds the next one. With `dense`, `visit` finds the unit's original
        weights and must call `collect` (be it for nothing) before it changes them.

        Raises:
            PumiceError: activations are NaN or Inf (names the unit).
        """
        with self._running():
            runs = self.segments()
            # Later segments are entered through the units before them, which are dense only now.
            dense = [self._entries(run, original=True) if self.dense else None for run in runs]
            for run, entries in zip(runs, dense, strict=True):
                self._walk_segment(run, visit, entries)

    def _entries(self, run: list[Unit], original: bool = False) -> Entries:
        """Hidden states at the start of a segment, by batch and call, and how its units are called."""
        calls: dict[str, list[list[CallRecord]]] = {unit.name: [] for unit in run}
        hidden: list[list[Tensor]] = []
        for batch in self.batches:
            records = self._enter(run, batch, original)
            hidden.append([self._widen(record.hidden()) for record in records[run[0].name]])
            for unit in run:
                calls[unit.name].append([record.without_hidden() for record in records[unit.name]])
        return hidden, calls

    def _walk_segment(self, run: list[Unit], visit: Visit, dense: Entries | None) -> None:
        hidden, calls = self._entries(run)
        states, dense_calls = dense if dense is not None else ([], {})
        for unit in run:
            self.source.load(unit.name, unit.module, original=self.dense)
            twin = Twin(unit, states, dense_calls[unit.name], self.compute) if dense is not None else None
            try:
                visit(unit, Collect(self, unit, hidden, calls[unit.name], twin))
                if unit is not run[-1]:
                    with self.precision():
                        self._advance(unit, calls[unit.name], hidden)
            finally:
                self.source.free(unit.name, unit.module)
            if twin is not None and unit is not run[-1]:
                states = twin.moved_on()
            del calls[unit.name]

    def _widen(self, hidden: Tensor) -> Tensor:
        """With autocast the residual stream is kept in float32, even where the weights are bf16."""
        return hidden.float() if self.compute == torch.bfloat16 and hidden.is_floating_point() else hidden

    def _advance(self, unit: Unit, calls: list[list[CallRecord]], hidden: list[list[Tensor]]) -> None:
        for index, (batch_calls, states) in enumerate(zip(calls, hidden, strict=True)):
            hidden[index] = [
                hidden_of(record.call(unit.module, state)) for record, state in zip(batch_calls, states, strict=True)
            ]
            # A sum is enough to see NaN or Inf and costs a fraction of looking at every element.
            if not all(torch.isfinite(state.sum(dtype=torch.float64)) for state in hidden[index]):
                raise PumiceError(f"calibration: block {unit.name} returns NaN or Inf; try --dtype float32.")
