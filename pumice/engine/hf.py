"""`from_pretrained` reads Pumice checkpoints after `import pumice`, without `import pumice` importing Transformers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
QUANTIZER = "pumice.engine.hf_quantizer"


class _AfterImport(MetaPathFinder):
    """Import hook that registers with Transformers as soon as its quantizer registry has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(QUANTIZER)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install_hook() -> None:
    """Make Transformers know `quant_method: "pumice"`: at once if it is imported already, else when it is.

    Calling it again changes nothing.
    """
    if REGISTRY in sys.modules:
        importlib.import_module(QUANTIZER)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
