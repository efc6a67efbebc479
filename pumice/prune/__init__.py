"""Pruning: scores, recoveries, allocations, and the pruner that puts them together.

The package shares its name with the function `pumice.prune`, and Python binds the package to that name as soon as
anything in it is imported; so the package can be called, and is the function.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`pumice.prune(...)`: see `pumice.engine.prune.prune`."""
        # By name: the engine stands above this package and may not be imported by it.
        return importlib.import_module("pumice.engine.prune").prune(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
