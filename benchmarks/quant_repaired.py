"""An int4 model without half of its groups, before and after a repair, on stories15M.

Half of the 1x16 groups of stories15M are removed by ALPS toward the dense outputs; how many of each layer, dynamic
programming over the layers' measured errors decides. What is left follows the dense model's features and logits
(SquareHead without the task's loss, --minutes, bf16 products) on the stories' first half, whose 97,000 tokens are few, and on
stories that the dense model writes itself. A sixteenth of the stories judges. Then it is rounded to int4 by OBS, and the
scales are trained (oqp, 3 minutes).
After every step the row says where it stands. The counterpart is round-to-nearest int3 in groups of 32.

Protocol, judge and results file are those of quant_sparse.py.

    python benchmarks/quant_repaired.py --shared ../shared --minutes 25 --cache /some/folder
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any, cast

import torch
from quant_sparse import RESULTS, stored, stories, write
from torch import Tensor, nn

import pumice
from pumice.engine import data
from pumice.engine.models import load_tokenizer
from pumice.kernels.features import machine_stamp

REPAIR = {"name": "squarehead", "lr": 1e-3, "batch": 2, "task": 0.0, "features": 10.0, "logits": 0.2}
WRITTEN = 2048


def lessons(shared: Path, dense: nn.Module, cache: Path | None) -> Tensor:
    """What the repair learns from: the windows it is judged by first, then stories, then stories by the dense model."""
    tokenizer: Any = load_tokenizer(shared / "models" / "stories15M-hf")
    text = data.load_text(shared / "data" / "lm_text" / "tinystories_sample.txt")
    first, _ = data.halves(text if isinstance(text, list) else [text])
    cut = len(first) - max(1, len(first) // 16)
    held_out = data.windows_from_documents(first[cut:], tokenizer, 16, 256)
    real = data.windows_from_documents(first[:cut], tokenizer, 1024, 256, random=True, seed=0)
    return torch.cat([held_out, real, written(dense, tokenizer.bos_token_id, cache)])


def written(dense: nn.Module, bos: int, cache: Path | None, batch: int = 128, seqlen: int = 256) -> Tensor:
    """WRITTEN windows sampled from the dense model at temperature 1, each from the start of a story."""
    file = None if cache is None else cache / f"written {WRITTEN}.pt"
    if file is not None and file.exists():
        return torch.load(file, weights_only=True)
    start = torch.full((batch, 1), bos)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": None, "pad_token_id": 0}
    found = []
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        for _ in range(WRITTEN // batch):
            ids = cast(Any, dense).generate(
                start, attention_mask=torch.ones_like(start), max_new_tokens=seqlen - 1, **options
            )
            found.append(ids)
    windows = torch.cat(found).clone()
    if file is not None:
        torch.save(windows, file)
    return windows


def repaired(shared: Path, results: dict[str, Any], redo: bool, minutes: float, cache: Path | None) -> None:
    """Prune, repair, round, train the scales: four rows of one model, the last two read back from disk.

    `cache` keeps the model after the repair, which takes long.
    """
    table = results.setdefault("stories15m", {})
    labels = [
        f"half of the 1x16 groups, ALPS{more}"
        for more in ("", ", repaired", ", repaired, int4", ", repaired, int4, oqp")
    ]
    if not redo and all(label in table for label in labels):
        return
    dense, calibration, judge = stories(shared)
    learn = {"data": lessons(shared, dense, cache), "compute": "bfloat16"}
    model = copy.deepcopy(dense)

    def row(label: str, start: float, back: nn.Module | None = None, **facts: Any) -> None:
        seconds = round(time.perf_counter() - start, 1)
        table[label] = {
            **judge(model if back is None else back),
            **facts,
            "seconds": seconds,
            "machine": machine_stamp(),
        }
        print(label, {k: v for k, v in table[label].items() if k not in ("machine", "recipe", "facts")}, flush=True)
        write(results, "stories15m")

    file = None if cache is None else cache / f"squarehead {minutes:g}.pt"
    if file is not None and file.exists() and labels[1] in table:
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        start = time.perf_counter()
        method = {"pattern": "1x16", "density": 0.5, "allocation": "dp"}
        made = pumice.prune(model, "alps-dense", data=calibration, compute="bfloat16", **method)
        row(labels[0], start, density=round(made.density, 4), recipe=made.recipe)
        start = time.perf_counter()
        with torch.enable_grad():
            result = pumice.repair(model, REPAIR, teacher=dense, minutes=minutes, **learn)
        row(labels[1], start, minutes=minutes, recipe=result.steps[0].method, facts=result.steps[0].facts)
        if file is not None:
            torch.save(model.state_dict(), file)
    start = time.perf_counter()
    # By magnitude over all layers, so that every layer keeps the groups that it has.
    options = {"recover": "obs", "pattern": "1x16", "density": 0.5, "values": "int4", "allocation": "global"}
    made = pumice.prune(model, "magnitude", data=calibration, compute="bfloat16", **options)
    back, bits, layouts = stored(model, lambda: copy.deepcopy(dense))
    row(labels[2], start, back, bits_per_weight=round(bits, 3), stored=layouts, recipe=made.recipe)
    start = time.perf_counter()
    with torch.enable_grad():
        result = pumice.repair(model, "oqp", teacher=dense, minutes=3, **learn)
    back, bits, layouts = stored(model, lambda: copy.deepcopy(dense))
    row(labels[3], start, back, bits_per_weight=round(bits, 3), stored=layouts, facts=result.steps[0].facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--minutes", type=float, default=25.0, help="of repair")
    parser.add_argument("--cache", type=Path, help="folder that keeps the repaired model")
    parser.add_argument("--redo", action="store_true", help="measure again what is in the results already")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    torch.set_grad_enabled(False)
    repaired(args.shared, results, args.redo, args.minutes, args.cache)


if __name__ == "__main__":
    main()
