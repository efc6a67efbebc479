"""Where the tests find real data and models; each helper skips with the reason when it is not there."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What one test measures is not for another: nothing can be kept here.
os.environ["PUMICE_CACHE"] = os.devnull
ROOT = Path(__file__).resolve().parent.parent
ISAS = ("avx512_bf16", "avx512", "avx2", "portable")


def pytest_make_parametrize_id(config, val, argname):
    """Names that are the same in every worker: no addresses, no numbers of a tensor, no order of a set."""
    if isinstance(val, torch.Tensor):
        return f"{argname}{list(val.shape)}"
    if isinstance(val, set | frozenset):
        return ",".join(sorted(map(str, val)))
    if callable(val) and hasattr(val, "__name__"):
        return val.__name__
    if isinstance(val, dict):
        parts = (f"{key}={pytest_make_parametrize_id(config, value, str(key)) or value}" for key, value in val.items())
        return ",".join(parts)[:80]
    return None


def shared(*parts: str) -> Path:
    """Path inside the data folder that lies beside the checkout (PUMICE_SHARED overrides), or skip."""
    path = Path(os.environ.get("PUMICE_SHARED", ROOT.parent / "shared")).joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {path.name} from the shared data folder, which is not beside this checkout")
    return path


def package_dir(package: str) -> Path:
    """Folder of an installed package that carries a model (not imported: its dependencies are not wanted), or skip."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs the package {package}, which is not installed (make setup installs it)")
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture(scope="session")
def stories():
    """Directory of stories15M, a real 15M Llama."""
    return shared("models", "stories15M-hf")


@pytest.fixture
def one_thread():
    """Numbers of a seed and one thread; threads and kernels are put back afterwards."""
    from pumice.kernels import cpu_backend

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    if cpu_backend.native is not None:
        cpu_backend.force(None)


@pytest.fixture
def poisoned(one_thread):
    """Memory that torch.empty gives out is filled with NaN, beside one thread and a seed."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def measured_here(one_thread, monkeypatch, tmp_path):
    """What `pack` measures is kept for this test alone."""
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path))


@pytest.fixture(params=ISAS)
def isa(request, one_thread):
    """Each instruction set in turn; one that this machine lacks is skipped with the reason."""
    from pumice.kernels import cpu_backend

    reason = cpu_backend.instruction_sets().get(request.param, cpu_backend.missing())
    if reason is not None:
        pytest.skip(reason)
    cpu_backend.force(request.param)
    return request.param
