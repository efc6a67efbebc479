"""What this machine has: CPU and GPU features for `pumice doctor`, and the stamp that goes beside every measurement."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pumice.kernels import cpu_backend


@cache
def cpu_model() -> str:
    """The processor's name as the operating system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Hardware", "cpu model"):
                return value.strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        try:
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    return platform.processor() or platform.machine()


def _cpuinfo_flags() -> list[str]:
    """Features by the operating system's word, where there is no extension to ask the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    wanted = ("avx2", "fma", "f16c", "avx_vnni", "avx512", "amx", "asimd", "bf16", "i8mm", "sve")
    return [flag for flag in flags if flag.startswith(wanted)]


def cpu_features() -> list[str]:
    """Instruction sets that matter to the kernels, spelt as Linux spells them."""
    found = list(cpu_backend.native.features()) if cpu_backend.native is not None else []
    return found or _cpuinfo_flags()


def gpus() -> list[dict[str, Any]]:
    """Name, memory in bytes and compute capability of each CUDA or ROCm device."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "memory": properties.total_memory, "capability": capability})
    return found


def memory_bytes() -> int | None:
    """Physical memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def features() -> dict[str, Any]:
    """Everything that decides which kernels run here.

    `kernels` maps each set of C++ kernels to None or the reason why it cannot run; `native_missing` is the reason why
    there are none at all; `torch_threads` tells whether they share PyTorch's threads.
    """
    native = cpu_backend.native
    return {
        "cpu": cpu_model(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory": memory_bytes(),
        "cpu_features": cpu_features(),
        "native": native is not None,
        "native_missing": cpu_backend.missing(),
        "kernels": cpu_backend.instruction_sets(),
        "kernels_in_use": native.current() if native is not None else None,
        "torch_threads": cpu_backend.torch_threads,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),
        "mkl": torch.backends.mkl.is_available(),
        "gpus": gpus(),
        "triton": importlib.util.find_spec("triton") is not None,
    }


def native_build() -> str | None:
    """Tells one build of the C++ kernels from another; None where there is none."""
    file = getattr(cpu_backend.native, "__file__", None)
    return None if file is None else f"{os.path.getsize(file)} bytes, {os.path.getmtime(file):.0f}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_stamp() -> dict[str, Any]:
    """What every measured number must be read beside: machine, versions, threads and date (UTC)."""
    here = features()
    keys = ("cpu", "machine", "cores", "memory", "cpu_features", "kernels_in_use", "gpus")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **{key: here[key] for key in keys},
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": _version("transformers"),
        "pumice": _version("pumice"),
    }
