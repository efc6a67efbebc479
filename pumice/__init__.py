"""Pumice: sparse neural networks in PyTorch that are really smaller and faster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pumice.engine.hf import install_hook

if TYPE_CHECKING:
    from pumice.core.errors import PumiceError as PumiceError
    from pumice.core.registry import methods as methods
    from pumice.engine.bench import bench as bench
    from pumice.engine.evaluate import evaluate as evaluate
    from pumice.engine.export import export as export
    from pumice.engine.fuse import fuse as fuse
    from pumice.engine.fuse import unfuse as unfuse
    from pumice.engine.generate import generate as generate
    from pumice.engine.pack import describe as describe
    from pumice.engine.pack import pack as pack
    from pumice.engine.pack import unpack as unpack
    from pumice.engine.prune import prune as prune
    from pumice.engine.repair import repair as repair
    from pumice.engine.rewrite import rewrite as rewrite
    from pumice.engine.shrink import shrink as shrink
    from pumice.engine.store import load as load
    from pumice.engine.store import save as save

__version__ = "0.1.0"

# Public names and the modules that hold them: loaded on first use, so that `import pumice` costs nothing.
_WHERE = {
    "PumiceError": "pumice.core.errors",
    "methods": "pumice.core.registry",
    "prune": "pumice.engine.prune",
    "repair": "pumice.engine.repair",
    "shrink": "pumice.engine.shrink",
    "rewrite": "pumice.engine.rewrite",
    "pack": "pumice.engine.pack",
    "unpack": "pumice.engine.pack",
    "fuse": "pumice.engine.fuse",
    "unfuse": "pumice.engine.fuse",
    "describe": "pumice.engine.pack",
    "save": "pumice.engine.store",
    "load": "pumice.engine.store",
    "evaluate": "pumice.engine.evaluate",
    "bench": "pumice.engine.bench",
    "generate": "pumice.engine.generate",
    "export": "pumice.engine.export",
}
__all__ = [
    "PumiceError",
    "__version__",
    "bench",
    "describe",
    "evaluate",
    "export",
    "fuse",
    "generate",
    "load",
    "methods",
    "pack",
    "prune",
    "repair",
    "rewrite",
    "save",
    "shrink",
    "unfuse",
    "unpack",
]


def public(name: str) -> Any:
    """The public function or class of that name, imported now."""
    return getattr(importlib.import_module(_WHERE[name]), name)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'pumice' has no attribute {name!r}")
    value = public(name)
    # A folder of the same name (prune) is bound by its import, can be called, and stays: both uses then work.
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*_WHERE, "__version__"})


install_hook()
