"""The calibration data in front of one unit of the stream: statistics of its layers, and the dense model beside it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pumice.core.calls import CallRecord, hidden_of, token_mask
from pumice.core.stats import Capture, EndOfPass, Inputs
from pumice.core.view import WeightView

if TYPE_CHECKING:
    from pumice.core.stream import Stream, Unit

Entries = tuple[list[list[Tensor]], dict[str, list[list[CallRecord]]]]
"""Hidden states in front of a segment, by batch and call, and how each of its units is called."""


KEPT_BYTES = 2 << 30
"""Up to here the inputs of a unit's layers in the dense model are kept, beyond it they are computed again."""


class Twin:
    """The dense model's activations in front of a unit, and behind it as far as they are known.

    Made while the unit is still dense. Where its layers are to change one after the other (`keep`), what they read in the
    dense model is remembered, or a copy of the unit.
    """

    def __init__(
        self, unit: Unit, states: list[list[Tensor]], calls: list[list[CallRecord]], dtype: torch.dtype
    ) -> None:
        self.module, self.views, self.states, self.calls, self.dtype = unit.module, unit.views, states, calls, dtype
        self.behind: dict[int, list[Tensor]] = {}
        self.known: dict[int, dict[str, list[Tensor]]] = {}
        self.reused = False

    def keep(self, masks: Sequence[Tensor | None]) -> None:
        """Take from the unit what is needed of it after it has changed."""
        names = {view.name for view in self.views}
        for index, mask in enumerate(masks):
            found = self.run(index, mask, names)
            if index == 0 and len(masks) * _bytes(found) > KEPT_BYTES:
                self.module, self.views = copy.deepcopy((self.module, self.views))
                return
            self.known[index] = found

    def run(self, index: int, mask: Tensor | None, names: set[str]) -> dict[str, list[Tensor]]:
        """What the layers `names` read of one batch; the first time, the pass goes to the end of the unit."""
        if index in self.known:
            return {name: [*self.known[index][name]] for name in names}
        whole = self.reused or index not in self.behind
        inputs = Inputs([view for view in self.views if view.name in names], mask, whole, self.dtype)
        states = []
        for record, state in zip(self.calls[index], self.states[index], strict=True):
            inputs.next_call()
            try:
                with inputs:
                    states.append(hidden_of(record.call(self.module, state.clone())))
            except EndOfPass:
                continue
        self.behind.setdefault(index, states)
        self.reused |= inputs.reused
        return inputs.seen

    def moved_on(self) -> list[list[Tensor]]:
        if len(self.behind) < len(self.states):
            raise RuntimeError("the unit was changed before its dense activations were taken")
        return [self.behind[index] for index in range(len(self.states))]


def _bytes(rows: dict[str, list[Tensor]]) -> int:
    """Memory of rows by layer; layers that read the same tensor share theirs."""
    distinct = {row.data_ptr(): row for found in rows.values() for row in found}
    return sum(row.numel() * row.element_size() for row in distinct.values())


class Collect:
    """The calibration data in front of one unit: statistics of its layers, as often as they are asked for."""

    def __init__(
        self, stream: Stream, unit: Unit, hidden: list[list[Tensor]], calls: list[list[CallRecord]], twin: Twin | None
    ) -> None:
        self.stream, self.unit, self.hidden, self.calls, self.twin = stream, unit, hidden, calls, twin
        self.tokens: dict[str, int] = {}
        """How many rows of input each layer was measured on."""

    def __call__(
        self, needs: frozenset[str], views: Sequence[WeightView] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Run the data through the unit as it is; the statistics of `views` (all of them) by name.

        Without needs only the dense activations move on.
        """
        wanted = self.unit.views if views is None else list(views)
        stream, names = self.stream, {view.name for view in wanted}
        for share in (True, False):
            capture = self._capture(wanted, needs, share)
            for index in range(len(self.calls)):
                mask = token_mask(stream.batches[index])
                with stream.precision():
                    if self.twin is not None:
                        capture.dense = self.twin.run(index, mask, names)
                    if needs:
                        self._run(capture, index, mask)
            if not capture.diverged:
                break
        stream.unpaired |= capture.unpaired
        self.tokens |= capture.tokens
        return capture.finish()

    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden states in front of the unit and behind it, call by call, each [T, D] without padding."""
        for index, batch in enumerate(self.stream.batches):
            mask = token_mask(batch)
            for record, state in zip(self.calls[index], self.hidden[index], strict=True):
                with self.stream.precision():
                    behind = hidden_of(record.call(self.unit.module, state.clone()))
                both = (state.float(), behind.float())
                masked = mask is not None and all(x.shape[:2] == mask.shape for x in both)
                yield tuple(x[mask.bool()] if masked else x.flatten(0, -2) for x in both)  # type: ignore[union-attr]

    def steps(self) -> list[list[WeightView]]:
        """The unit's layers in the order in which they run, those together that read the same tensor.

        Afterwards the unit may be changed step by step.
        """
        capture = self._capture(self.unit.views, frozenset(), True)
        with self.stream.precision():
            self._run(capture, 0, token_mask(self.stream.batches[0]))
            if self.twin is not None:
                self.twin.keep([token_mask(batch) for batch in self.stream.batches])
        by_name = {view.name: view for view in self.unit.views}
        groups: dict[Any, list[WeightView]] = {}
        for name, accumulator in capture.accumulators.items():
            view = by_name.pop(name)
            # The experts of one tensor are one step: each reads other tokens, but none reads what another gives.
            key = id(accumulator) if view.expert is None else (view.module_name, view.parameter)
            groups.setdefault(key, []).append(view)
        return [*groups.values(), *([list(by_name.values())] if by_name else [])]

    def _capture(self, views: Sequence[WeightView], needs: frozenset[str], share: bool) -> Capture:
        bf16 = self.stream.compute == torch.bfloat16
        return Capture(views, needs, batches=len(self.calls), bf16=bf16, share=share)

    def _run(self, capture: Capture, index: int, mask: Tensor | None) -> None:
        capture.next_batch(mask)
        for record, state in zip(self.calls[index], self.hidden[index], strict=True):
            capture.next_call()
            try:
                with capture:
                    # Some blocks change their input in place, and it is needed again.
                    record.call(self.unit.module, state.clone())
            except EndOfPass:
                continue
