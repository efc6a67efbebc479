"""CHITA on the 6 million pruned weights of stories15M: layer by layer, all layers in one problem, and in stages (CHITA++).

Every row runs in a process of its own, so that its peak memory is its own: PyTorch, model, data and gradients included.
64 gradients of single windows; perplexity as in prune_quality.py. "all layers at once" lets the weights of all layers
compete in one regression, in units of their curvature. CHITA++ prunes in three steps of falling density, with new
gradients of the pruned model before each. A Hessian of these weights would take 145 terabytes.

    python benchmarks/chita.py --shared ../shared            # writes benchmarks/results/chita.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from prune_quality import judge, stories
from torch import Tensor, nn

import pumice
from pumice.core import select
from pumice.core.gradients import gradients_bytes, model_stats
from pumice.core.view import find_views
from pumice.kernels.features import machine_stamp
from pumice.prune.recover.chita import ridges, solve
from pumice.prune.run import peak_memory_bytes

RESULTS = Path(__file__).parent / "results" / "chita.json"
JOINT = "chita, all layers at once"
STAGES = "chita++, three stages"
ROWS = [(name, density) for density in (0.5, 0.3) for name in ("magnitude", "fisher", "chita", JOINT, STAGES)]


def jointly(model: nn.Module, draw: Tensor, density: float) -> None:
    """One regression over every pruned weight of the model."""
    views = find_views(model)
    found = model_stats(model, views, [{"input_ids": ids[None]} for ids in draw], frozenset({"gradients"}))
    gradients = [found[view.name]["gradients"] for view in views]
    dense = [view.read() for view in views]
    sizes = [w.numel() for w in dense]

    def project(ws: list[Tensor]) -> list[Tensor]:
        every = torch.cat([w.flatten() for w in ws]).square()
        mask = select.topk(every, select.keep_count(len(every), density))
        return [part.view(w.shape) for part, w in zip(mask.split(sizes), ws, strict=True)]

    new, _ = solve(gradients, dense, project, ridge=ridges(gradients, 0.001, 3.0), iterations=10)
    for view, w in zip(views, new, strict=True):
        view.write(w)


def measure(shared: Path, name: str, density: float) -> dict[str, Any]:
    model, calibration, evaluation, bf16 = stories(shared)
    draw = calibration("0")
    start = time.perf_counter()
    if name == JOINT:
        jointly(model, draw, density)
    else:
        score = "fisher" if name == "fisher" else "magnitude"
        steps = (density ** (1 / 3), density ** (2 / 3), density) if name == STAGES else (density,)
        for step in steps:
            recover = "none" if name in ("magnitude", "fisher") else "chita"
            pumice.prune(model, score, recover=recover, density=step, data=draw, compute="float32", progress=False)
    seconds = time.perf_counter() - start
    views = find_views(model)
    kept = sum(int(torch.count_nonzero(view.read())) for view in views) / sum(view.numel for view in views)
    return {
        "method": name,
        "density": kept,
        "weights": sum(view.numel for view in views),
        "gradients_bytes": gradients_bytes(views, len(draw)) if name not in ("magnitude", "fisher") else 0,
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "perplexity": judge(model, evaluation, bf16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--row", type=int, help="measure one row and print it")
    args = parser.parse_args()
    if args.row is not None:
        print(json.dumps(measure(args.shared, *ROWS[args.row])))
        return
    rows = []
    for index in range(len(ROWS)):
        command = [sys.executable, __file__, "--shared", str(args.shared), "--row", str(index)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(answer.strip().splitlines()[-1]))
        print(rows[-1], flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"rows": rows, "machine": machine_stamp(), "protocol": __doc__}, indent=1) + "\n")


if __name__ == "__main__":
    main()
