"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: their own tests, on a build that stops at the first fault."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pumice.kernels import cpu_backend

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "test_fuse.py",
    "test_kernels.py",
    "test_coded_kernels.py",
    "test_conv_kernels.py",
    "test_lanes.py",
    "test_grouped_kernels.py",
    "test_hidden.py",
    "test_calibration_kernels.py",
)
FAULT = """
static int broken[4];
extern "C" __attribute__((visibility("default"))) int read_at(int i) { return broken[i]; }
"""
# The extension is put in the place of the ordinary one before anything imports it.
RUN = """
import importlib.util, sys
import pumice
spec = importlib.util.spec_from_file_location("pumice._native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["pumice._native"] = pumice._native = module
spec.loader.exec_module(module)
from pumice.kernels import cpu_backend
assert cpu_backend.native is module
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def libraries() -> str | None:
    """What has to be loaded before everything else, so that the sanitizer sees exceptions too; None where there is none."""
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        # An unknown name is given back as it is.
        if os.sep not in found or not Path(found).exists():
            return None
        paths.append(found)
    return " ".join(paths)


ASAN = libraries()
pytestmark = [
    pytest.mark.skipif(ASAN is None, reason="no g++ with AddressSanitizer here"),
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the sources are not beside the tests"),
]


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "LD_PRELOAD": str(ASAN),
        # Python and PyTorch keep what they allocate; that is not what is looked for.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        **more,
    }


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels, compiled with both sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "o"),
    ]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PUMICE_SANITIZE": "1"}, capture_output=True, text=True)
    made = list((folder / "pumice").glob("_native*.so"))
    assert made, done.stderr[-2000:]
    return made[0]


@pytest.mark.skipif(cpu_backend.native is None, reason="the C++ kernels are not built")
def test_the_kernels_own_tests_find_no_fault(build: Path) -> None:
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    # Without capturing, so that the sanitizer's report is seen; the largest shapes teach it nothing new.
    options = ["-x", "-p", "no:cacheprovider", "--capture=no", "-k", "not 1100 and not compilers and not real_model"]
    command = [sys.executable, "-c", RUN, str(build), *options, *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert " passed" in done.stdout


def test_such_a_build_would_stop_at_a_fault(tmp_path: Path) -> None:
    source, made = tmp_path / "broken.cpp", tmp_path / "broken.so"
    source.write_text(FAULT)
    flags = ["-shared", "-fPIC", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["g++", *flags, str(source), "-o", str(made)], check=True)
    code = f"import ctypes; print(ctypes.CDLL({str(made)!r}).read_at(4))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert "out of bounds" in done.stderr or "AddressSanitizer" in done.stderr
