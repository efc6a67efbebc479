"""Transformers knows Pumice's checkpoints and experts after `import pumice`, which does not import Transformers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRIES = {
    "transformers.quantizers.auto": "pumice.engine.hf_quantizer",
    "transformers.integrations.moe": "pumice.moe.hf",
}
"""Modules of Transformers that hold a registry, and ours that register there when imported."""


class _AfterImport(MetaPathFinder):
    """Import hook that registers with Transformers as soon as one of its registries has been imported."""

    def __init__(self) -> None:
        self.waiting = {theirs for theirs in REGISTRIES if theirs not in sys.modules}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname not in self.waiting:
            return None
        self.waiting.discard(fullname)
        if not self.waiting:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(REGISTRIES[fullname])

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install_hook() -> None:
    """Make Transformers know `quant_method: "pumice"` and `experts_implementation="pumice"`: at once where it is
    imported already, else when it is.

    Calling it again changes nothing.
    """
    for theirs, ours in REGISTRIES.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
    finder = _AfterImport()
    if finder.waiting and not any(isinstance(other, _AfterImport) for other in sys.meta_path):
        sys.meta_path.insert(0, finder)
