"""Pumice: sparse neural networks in PyTorch that are really smaller and faster."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from pumice.engine.hf import install_hook

__version__ = "0.1.0"

# Public names and the modules that hold them: loaded on first use, so that `import pumice` costs nothing.
_WHERE = {
    "PumiceError": "pumice.core.errors",
    "methods": "pumice.core.registry",
    "prune": "pumice.engine.prune",
    "pack": "pumice.engine.pack",
    "unpack": "pumice.engine.pack",
    "describe": "pumice.engine.pack",
    "save": "pumice.engine.store",
    "load": "pumice.engine.store",
    "evaluate": "pumice.engine.evaluate",
    "bench": "pumice.engine.bench",
    "generate": "pumice.engine.generate",
    "export": "pumice.engine.export",
}
__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'pumice' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


install_hook()


class _Package(ModuleType):
    """`pumice.prune` is a function, and the folder of that name is imported on the way: it must not hide the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
