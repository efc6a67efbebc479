"""Pruning: scores, recoveries, allocations, and the pruner that puts them together.

The package shares its name with the function `pumice.prune`, and Python binds the package to that name as soon as
anything in it is imported; so the package can be called, and then is the function.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`pumice.prune(...)`: see `pumice.engine.prune.prune`."""
        return sys.modules["pumice"].public("prune")(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(sys.modules["pumice"].public("prune"))


sys.modules[__name__].__class__ = _Callable
