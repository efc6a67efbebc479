"""Expert parallelism under torchrun with gloo: 2 and 4 processes against one, and what happens when one is lost."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pumice.core.errors import PumiceError
from pumice.moe import MoE
from pumice.moe.parallel import parallelise

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
