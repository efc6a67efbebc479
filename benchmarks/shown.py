"""What the generated tables share: names, numbers, rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

TITLES = {"0.5": "50 % zeros", "0.3": "70 % zeros", "0.7": "30 % zeros"}
NAMES = {"smollm2-135m": "SmolLM2-135M-Instruct", "stories15m": "stories15M"}
ENCODER = "all-MiniLM-L6-v2"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def seconds(entry: dict[str, Any]) -> str:
    """How long a row took; nothing where it was not timed."""
    return "" if entry.get("seconds") is None else f"{entry['seconds']:,.0f}"


def machine(stamp: dict[str, Any]) -> str:
    return f"{stamp['cores']} cores of {stamp['cpu']}, {stamp['kernels_in_use']}"
