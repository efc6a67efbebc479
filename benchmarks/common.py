"""What the benchmarks of quality share: their arguments, and a results file that is written after every row."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


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
