"""Expert parallelism under torchrun with gloo: 2 and 4 processes against one, and what happens when one is lost."""

import ast
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pumice.core.errors import PumiceError
from pumice.moe import MoE, Plan
from pumice.moe.parallel import _Parcels, _unpack, parallelise

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "tests" / "parallel_worker.py"
CHECKS = [
    node.name.removeprefix("check_")
    for node in ast.parse(WORKER.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"
)


def torchrun(processes, script, *arguments, limit=500):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    more = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
    return subprocess.run(
        [*command, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=limit,
        env={**os.environ, **more},
        check=False,
    )


@pytest.fixture(scope="module", params=[2, 4])
def reports(request, tmp_path_factory):
    """What every process says of every check."""
    folder = tmp_path_factory.mktemp(f"world{request.param}")
    done = torchrun(request.param, WORKER, folder, "checks", 120)
    files = sorted(folder.glob("report*.json"))
    assert len(files) == request.param, done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("check", CHECKS)
def test_processes_equal_one(reports, check):
    said = [report.get(f"check_{check}", "an earlier check failed") for report in reports]
    if said[0].startswith("needs"):
        pytest.skip(said[0])
    assert said == ["ok"] * len(reports), "\n".join(said)


@pytest.mark.parametrize(("how", "processes"), [("exit", 3), ("kill", 2), ("hang", 2)])
def test_a_lost_process_ends_all(tmp_path, how, processes):
    patience = 5 if how == "hang" else 900
    started = time.monotonic()
    done = torchrun(processes, WORKER, tmp_path, how, patience)
    assert done.returncode != 0
    assert time.monotonic() - started < 450
    waited = [float(file.read_text()) for file in tmp_path.glob("lost*")]
    if how == "kill":
        # torchrun ends the others by itself, perhaps before they see it.
        assert "SIGKILL" in done.stderr or "exitcode  : -9" in done.stderr
    else:
        assert len(waited) == processes - 1
        said = done.stderr
        assert re.search(r"PumiceError: MoE layer 'blocks\.1' on rank 0 waited for the counts of tokens", said), said
        assert "has ended, hangs, or has left this layer out" in said
        assert "torchrun" in said
    # Processes may be stopped for minutes on a busy machine, but not for the group's 900 seconds.
    assert all(seconds < 400 for seconds in waited)


def test_the_documented_script_runs(tmp_path):
    text = (ROOT / "docs" / "moe.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text[text.index("## Several processes") :], re.DOTALL)
    (tmp_path / "train.py").write_text(blocks[0])
    done = torchrun(2, tmp_path / "train.py", tmp_path / "moe.safetensors")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loss" in done.stdout
    MoE(64, 128, experts=8).load_state_dict(load_file(tmp_path / "moe.safetensors"))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_token_travels_once_to_each_process(world):
    generator = torch.Generator().manual_seed(world)
    index_TK = torch.rand(50, 8, generator=generator).argsort(1)[:, :3]
    plan = Plan.top_k(index_TK, torch.rand(50, 3, generator=generator), 8)
    local = 8 // world
    parcels = _Parcels.of(plan, local, world)
    wanted = [
        sorted({token for token, row in enumerate(index_TK.tolist()) if any(e // local == rank for e in row)})
        for rank in range(world)
    ]
    assert [rows.tolist() for rows in parcels.token_U.split(parcels.rows_W.tolist())] == wanted
    weights = plan.weight_A.split(parcels.pairs_W.tolist())
    pairs = parcels.pair_A.split(parcels.pairs_W.tolist())
    for rank in range(world):
        here = _unpack(pairs[rank], weights[rank], [len(wanted[rank])], [len(pairs[rank])], local)
        torch.testing.assert_close(here.combine_TE, plan.combine_TE[wanted[rank], rank * local : (rank + 1) * local])


def test_bytes_per_token_are_as_documented():
    experts, k, world, tokens = 8, 2, 4, 20000
    index_TK = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :k]
    parcels = _Parcels.of(Plan.top_k(index_TK, torch.ones(tokens, k), experts), experts // world, world)
    away = (world - 1) / world * len(parcels.token_U) / tokens
    expected = (world - 1) * (1 - math.comb(experts - experts // world, k) / math.comb(experts, k))
    assert away == pytest.approx(expected, rel=0.01)
    said = re.search(r"n is ([\d.]+) and a\s+token costs ([\d.]+) kB", (ROOT / "docs" / "moe.md").read_text())
    assert said is not None
    assert float(said[1]) == pytest.approx(expected, abs=0.005)
    assert float(said[2]) == pytest.approx(2 * expected * 4096 * 2 / 1000, abs=0.05)


def test_a_group_is_needed():
    with pytest.raises(PumiceError, match=r"init_process_group.*before parallelise"):
        parallelise(MoE(8, 4, 4))


def test_one_process_is_a_group_too():
    layer = MoE(8, 4, 4)
    x = torch.randn(5, 8)
    wanted = layer(x)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.testing.assert_close(parallelise(layer)(x), wanted)
    finally:
        dist.destroy_process_group()


def test_a_loss_that_watches_the_experts_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(PumiceError, match=r"gradient_conflict.*leave it whole"):
            parallelise(MoE(8, 4, 4, balance=["gradient_conflict"]))
    finally:
        dist.destroy_process_group()
