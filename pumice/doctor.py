"""What this machine has, which kernels run on it, and why the others do not: the content of `pumice doctor`."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from pumice.core import dispatch, registry
from pumice.core.dispatch import Call
from pumice.kernels.features import features

SHAPE = (4096, 4096)
ROWS = (1, 16)
DTYPES = (torch.bfloat16, torch.float32)
PACKAGES = ("pumice", "torch", "transformers", "safetensors", "numpy")


def examine() -> dict[str, Any]:
    """Features, versions, kernels with their reasons, and optional packages, as plain data."""
    found = features()
    return {
        **found,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
        "backends": backends(),
        "extras": extras(),
        "problems": _problems(found),
    }


def backends() -> list[dict[str, Any]]:
    """Every backend of every layout, type and row count, on a 4096 x 4096 matrix; `reason` None where it runs."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for info in registry.layout.members():
        params = info.obj.examples[0]
        for device in devices:
            for dtype in DTYPES:
                for count in ROWS:
                    call = Call("linear", info.name, dtype, device, count, SHAPE, params)
                    for backend, reason in dispatch.candidates(call):
                        rows.append(
                            {
                                "layout": info.name,
                                "backend": backend.name,
                                "device": device,
                                "dtype": str(dtype).removeprefix("torch."),
                                "rows": count,
                                "reason": reason,
                                "summary": backend.summary,
                            }
                        )
    return rows


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def extras() -> list[dict[str, Any]]:
    """Pumice's optional extras, as its metadata lists them: what is missing and how to get it."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("pumice") or []]
        names = importlib.metadata.metadata("pumice").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for extra in names:
        # What holds with the extra and not without it belongs to the extra.
        own = [
            one.name
            for one in wanted
            if one.marker is not None
            and one.marker.evaluate({"extra": extra})
            and not one.marker.evaluate({"extra": ""})
        ]
        missing = [name for name in own if version(name) is None]
        found.append({"extra": extra, "missing": missing, "hint": f"pip install 'pumice[{extra}]'" if missing else ""})
    return found


def _problems(found: dict[str, Any]) -> list[str]:
    """What a user should know and can change."""
    problems = []
    if not found["native"]:
        problems.append(f"no C++ kernels ({found['native_missing']}): sparse layers run through PyTorch, mostly slower")
    elif not found["torch_threads"]:
        problems.append("the C++ kernels could not join PyTorch's threads and use their own")
    if version("pumice") is None:
        problems.append("pumice is used without being installed: pip install -e . registers its command and versions")
    return problems
