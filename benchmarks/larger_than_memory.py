"""Prune a model that does not fit the memory it is given: from disk to disk, one block at a time.

A Llama of 1.3 billion random weights (2.5 GB in bf16, a file per block, never in memory as a whole) is pruned in a
process whose private memory the kernel limits to a share of that (RLIMIT_DATA; what is reserved counts, used or not). The same
process without streaming, which loads the model first, must fail under this limit; both outcomes are recorded, with the peak of
the resident memory (VmHWM: pages of the checkpoint's files count as long as they are mapped) and of its private part (RssAnon,
sampled).

    python benchmarks/larger_than_memory.py --folder /some/disk     # needs 5 GB there, removed afterwards
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "larger_than_memory.json"
SHAPE: Any = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16}
VOCABULARY, SAMPLES, SEQLEN, DENSITY = 8192, 8, 128, 0.5


def write_model(folder: Path) -> int:
    """The checkpoint, block by block; returns the bytes of its weights."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPE, num_key_value_heads=8, vocab_size=VOCABULARY, architectures=["LlamaForCausalLM"], dtype="bfloat16"
    )
    config.save_pretrained(folder)
    with init_empty_weights():
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        block = re.match(r"model\.layers\.(\d+)\.", name)
        files.setdefault(f"model-{int(block[1]):05d}.safetensors" if block else "model-rest.safetensors", []).append(
            name
        )
    generator = torch.Generator().manual_seed(0)
    for file, names in files.items():
        tensors = {}
        for name in names:
            norm = "norm" in name
            made = torch.ones(shapes[name]) if norm else torch.randn(shapes[name], generator=generator) * 0.02
            tensors[name] = made.to(torch.bfloat16)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    where = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return 2 * sum(shape.numel() for shape in shapes.values())


class Peak(threading.Thread):
    """Samples this process's private resident memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anon, self.going = 0, True

    def run(self) -> None:
        while self.going:
            self.anon = max(self.anon, status("RssAnon"))
            time.sleep(0.02)


def status(key: str) -> int:
    """A size from /proc/self/status in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def child(folder: Path, out: Path, method: str, limit: int, streamed: bool) -> None:
    """Prune under the limit and print what it took, as JSON; `streamed` False loads the model first."""
    import torch

    import pumice
    from pumice.engine.models import load_model

    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    data = torch.randint(0, VOCABULARY, (SAMPLES, SEQLEN), generator=torch.Generator().manual_seed(0))
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    found: dict[str, Any]
    try:
        model: Any = folder if streamed else load_model(folder).model
        result = pumice.prune(model, method, density=DENSITY, data=data, out=out, overwrite=True)
        found = {"outcome": "pruned", "layers": len(result.layers), "density": result.density, "notes": result.notes}
    except Exception as error:
        # Which class a failed allocation raises depends on who asked for the memory.
        said = str(error).splitlines()[0].replace(str(folder), "MODEL")
        found = {"outcome": "failed", "error": f"{type(error).__name__}: {said[:200]}"}
    peak.going = False
    found |= {"seconds": round(time.perf_counter() - start, 1), "peak_private_bytes": peak.anon}
    print(json.dumps({**found, "peak_resident_bytes": status("VmHWM")}))


def run_child(folder: Path, out: Path, method: str, limit: int, streamed: bool) -> dict[str, Any]:
    options = ["--child", method, "--folder", str(folder), "--out", str(out), "--limit", str(limit)]
    command = [sys.executable, __file__, *options, *([] if streamed else ["--whole"])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    line = (done.stdout.strip().splitlines() or [json.dumps({"outcome": f"killed ({done.returncode})"})])[-1]
    return {"method": method, "streamed": streamed, **json.loads(line)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--share", type=float, default=0.6, help="of the checkpoint's bytes, what a process may have")
    parser.add_argument("--methods", default="wanda", help="methods, separated by commas")
    for name in ("--child", "--out", "--limit"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.folder, Path(args.out), args.child, int(args.limit), not args.whole)
        return
    from pumice.kernels.features import machine_stamp
    from pumice.report import disk_bytes

    work = Path(tempfile.mkdtemp(prefix="pumice-large-", dir=args.folder))
    try:
        model, out = work / "model", work / "out"
        model.mkdir()
        size = write_model(model)
        limit = int(size * args.share)
        runs = []
        for method in args.methods.split(","):
            runs.append(run_child(model, out, method, limit, True))
            if runs[-1]["outcome"] == "pruned":
                runs[-1]["disk_bytes"] = disk_bytes(out)
            print(runs[-1], flush=True)
        runs.append(run_child(model, out, args.methods.split(",")[0], limit, False))
        print(runs[-1], flush=True)
    finally:
        shutil.rmtree(work)
    facts = {"model": {**SHAPE, "vocab_size": VOCABULARY, "bytes": size}, "limit_private_bytes": limit}
    facts |= {"samples": SAMPLES, "seqlen": SEQLEN, "density": DENSITY, "runs": runs, "machine": machine_stamp()}
    RESULTS.write_text(json.dumps({"protocol": __doc__, **facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
