"""What the comparison with other engines computes without them: CPU time, which turns count, its tables, a worker's answers."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
STAMP = {"cores": 3, "cpu": "Made Up", "kernels_in_use": "none"}


@pytest.fixture
def module(monkeypatch):
    """A script of the benchmarks as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_cpu_seconds_are_those_of_the_cores_without_idle_and_waiting(module):
    stat = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 20 30 4000 500 6 7 8 9 9\ncpu1 1 0 0 7000 0 0 0 0 0 0\nintr 5 6\n"
    tick, seconds = os.sysconf("SC_CLK_TCK"), module("peers").cpu_seconds
    assert seconds(stat, [0]) == 171 / tick
    assert seconds(stat, [0, 1]) == 172 / tick
    assert seconds(stat, []) == 0


@pytest.fixture(autouse=True)
def restored():
    """A worker has a process of its own and sets threads and gradients there; here they are put back."""
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(gradients)


def test_quiet_turns_count_and_without_enough_the_least_disturbed(module):
    undisturbed = module("peers").undisturbed
    samples = [(1.0, 0.5), (2.0, 0.0), (3.0, 0.04), (4.0, 0.2)]
    assert undisturbed(samples, 2) == ([2.0, 3.0], 0.04)
    assert undisturbed(samples, 3) == ([2.0, 3.0, 4.0], 0.2)


def test_copies_fill_the_memory_and_are_two_at_least(module):
    copies = module("peer_common").copies
    assert copies(10, 95) == 10
    assert copies(100, 95) == 2


def test_calls_take_turns(module):
    seen = []
    run = module("peer_common").timed([lambda: seen.append("a"), lambda: seen.append("b")])
    assert seen == ["a", "b"]  # each once beforehand
    seen.clear()
    assert run(3) >= 0
    assert seen in (["a", "b", "a"], ["b", "a", "b"])


def test_a_worker_says_what_is_missing(module):
    workers = module("peer_workers")
    with_none = {"make": "decode_llama", "llama": None, "threads": 1}
    assert "folder" in workers.answer(with_none, {})["missing"]
    nowhere = {"make": "mlp_pumice", "threads": 1, "weights": "nowhere.npy", "inputs": "nowhere.npy"}
    assert workers.answer(nowhere, {})["missing"].startswith("FileNotFoundError")


def test_a_worker_answers_each_line_once():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "peer_workers.py")],
        input='{"make": "decode_llama", "llama": null, "threads": 1}\n' * 2,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.splitlines()) == 2


def test_every_row_names_a_kind_of_worker_and_a_known_peer(module):
    peers, workers = module("peers"), module("peer_workers")
    tables = (peers.MLP, peers.INT4, peers.DECODE, peers.DECODE_LARGE, peers.RESNET)
    for row in [row for table in tables for row in table.values()]:
        assert row["make"] in workers.KINDS
        assert row["peer"] in (None, *peers.PEERS)
    asked = {row["row"] for row in peers.DECODE.values() if row["make"] == "decode_pumice"}
    assert asked <= {"eager", *module("decode").rows(nn.Module())}


def test_a_table_says_where_ours_is_slower(module):
    def rows(sparse):
        return {
            "Pumice bf16, 90 % zeros": {"ms": sparse, "ran": "csr", "relative_error": 0.002},
            "Other bf16": {"ms": 2.0, "ran": "Other 1", "relative_error": 0.001, "disturbed": 0.3},
            "Absent": {"missing": "pip install absent"},
        }

    results = {
        "mlp, 1 thread, 1 row": {"rows": rows(1.0), "machine": STAMP},
        "mlp, 1 thread, 16 rows": {"rows": rows(3.0), "machine": STAMP},
        "protocol": "made up",
    }
    text = module("sections").peers(results, "mlp")
    assert "| Pumice bf16, 90 % zeros | 1.00 | 3.00 | 2.0e-03 | csr |" in text
    assert "| Other bf16 | 2.00* | 2.00* |" in text
    assert "1 thread, 1 row: the fastest other is Other bf16, 2.00* ms; everything of ours is faster." in text
    assert "slower than it: bf16, 90 % zeros (1.50×)" in text
    assert "Not measured: Absent (pip install absent)." in text
    assert module("sections").peers(results, "decode") == ""
