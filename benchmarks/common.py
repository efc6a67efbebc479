"""What benchmarks share: arguments, a results file that is written after every row, and copies of a layer to rotate."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from pumice.weights.layouts.base import Packed

Key = TypeVar("Key")


def arguments(doc: str | None, folders: str = "data/ and models/", redo: bool = True) -> argparse.ArgumentParser:
    """A parser for where the data are and which rows are wanted."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help=f"folder with {folders}")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--match", default="", help="rows whose name contains this")
    if redo:
        parser.add_argument("--redo", action="store_true", help="measure again what is in the results already")
    return parser


def read(path: Path) -> dict[str, Any]:
    """The results so far."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, results: dict[str, Any], **facts: Any) -> None:
    """The results with what is to be said of them, such as the protocol."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**results, **facts}, indent=1) + "\n")


def in_turns(
    control: Mapping[Key, Callable[[], Any]],
    cases: Iterable[Callable[[], Mapping[Key, Callable[[], Any]]]],
    rounds: int,
    calls: int = 4,
) -> list[dict[Key, list[float]]]:
    """Milliseconds a call of every case and of the control in its turns: `rounds` turns of `calls` calls for each.

    A case is made, measured in turns with the control and dropped before the next one, so that memory holds the weights of one:
    a virtual machine that fills up gets slow in ways that have nothing to do with any of them. Each has the control's times
    of its own turns, since what else runs on the machine changes from minute to minute.
    """

    def one(runs: Mapping[Key, Callable[[], Any]]) -> dict[Key, list[float]]:
        samples: dict[Key, list[float]] = {key: [] for key in runs}
        for turn in range(rounds + 1):
            for key, run in runs.items():
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                if turn:
                    samples[key].append((time.perf_counter() - start) / calls * 1e3)
        return samples

    return [one({**control, **case()}) for case in cases]


def rotated(runs: Iterable[Callable[[Tensor], Tensor]], x: Tensor) -> Callable[[], Tensor]:
    """A call that takes another copy of a layer each time, so that its weights come from memory."""
    turn = itertools.cycle(list(runs))
    return lambda: next(turn)(x)


def forms(packed: Packed) -> list[Packed]:
    """A stored matrix, and its form for memory where there is one: what `pack` tries."""
    from pumice.weights.layouts.base import grid_of, possible, repack, unpack

    found = possible(unpack(packed), grid_of(packed), memory=True)
    same = [(name, params) for name, params, _ in found if name in (f"{packed.layout}-lanes", f"{packed.layout}-tiles")]
    return [packed, *(repack(packed, name, **params) for name, params in same)]


def copies(packed: Packed, count: int) -> list[Packed]:
    """As many copies of a stored matrix, in huge pages as `pack` puts weights."""
    from pumice.engine import pages
    from pumice.weights.layouts.base import Packed

    made = [
        Packed(
            packed.layout, packed.shape, packed.dtype, {n: t.clone() for n, t in packed.tensors.items()}, packed.params
        )
        for _ in range(count)
    ]
    pages.gather(tensor for one in made for tensor in one.tensors.values())
    return made
