"""Keep what one run of the demo measured as benchmarks/results/demo.json (without per-layer lists and pictures).

make demo && python benchmarks/record_demo.py pumice-demo
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "demo.json"
KEPT = (
    "format",
    "title",
    "command",
    "model",
    "recipe",
    "columns",
    "curve",
    "bench",
    "generations",
    "notes",
    "versions",
    "machine",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what the demo wrote")
    report = json.loads((parser.parse_args().folder / "report.json").read_text())
    kept = {name: report[name] for name in KEPT}
    kept["command"] = "make demo"
    kept["prune"] = {name: report["prune"][name] for name in ("seconds", "density", "peak_memory_bytes", "recipe")}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
