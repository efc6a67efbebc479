"""Imports point one way, and `import pumice` stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "pumice"
FILES = sorted(PACKAGE.rglob("*.py"))
MAY = {
    "core": {"core"},
    "weights": {"core", "weights"},
    "prune": {"core", "weights", "prune"},
    "kernels": {"core", "weights", "kernels", "_native"},
    "moe": {"core", "weights", "moe"},
    "engine": {"core", "weights", "prune", "kernels", "engine", "recipe"},
}
"""Folder -> what it may import (`_native` is the compiled library)."""
FACES = {"", "analyze", "cli"}
"""They may import everything: files directly in the package, the command line, and what reports are made of."""


def folder_of(module):
    """`core` of `pumice.core.view`, `recipe` of `pumice.recipe`, "" of `pumice` itself."""
    return module.split(".")[1] if "." in module else ""


def modules_imported(path):
    """Every module of Pumice that a file imports anywhere, inside functions too, with its line."""
    package = ["pumice", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from pumice import core` names a folder, `from pumice.core import view` a file.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "pumice" else [module]
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", "") == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names = [node.args[0].value]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == "pumice")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    parts = path.relative_to(PACKAGE).parts
    home = parts[0] if len(parts) > 1 else ""
    if home in FACES:
        return
    assert home in MAY, f"say what {home} may import, here and in docs/architecture.md"
    for module, line in modules_imported(path):
        target = folder_of(module)
        assert target in MAY[home], f"{path.relative_to(PACKAGE.parent)}:{line}: {home} must not import {module}"


def test_nobody_imports_a_kernel_by_name():
    """Backends register into `core.dispatch`; only what the machine can do (`features`) is asked for directly."""
    for path in FILES:
        if path.parent.name == "kernels":
            continue
        for module, line in modules_imported(path):
            is_backend = module.startswith("pumice.kernels") and module != "pumice.kernels.features"
            assert not is_backend, f"{path.relative_to(PACKAGE)}:{line}: {module}"


def test_the_walk_sees_what_it_should(tmp_path):
    file = PACKAGE / "core" / "imaginary.py"
    source = "import pumice.engine.hf\ndef f():\n    from pumice.prune import run\nfrom pumice import recipe\nfrom ..weights import modules\n"
    tree = ast.parse(source)
    assert tree

    class Fake(type(file)):
        def read_text(self, encoding=None):
            return source

    found = {folder_of(module) for module, _ in modules_imported(Fake(file))}
    assert found == {"engine", "prune", "recipe", "weights"}


def test_importing_pumice_loads_nothing_heavy():
    heavy = [
        "transformers",
        "datasets",
        "matplotlib",
        "scipy",
        "typer",
        "numpy.testing",
        "pandas",
        "safetensors",
        "yaml",
    ]
    code = f"import sys, pumice; print(*[m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_core_of_pruning_needs_no_transformers():
    code = (
        "import sys, torch\nfrom pumice.core import registry\nregistry.methods()\nfrom pumice.prune.run import Pruner\n"
        "print(*[m for m in ('transformers', 'datasets', 'scipy', 'typer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    "first", ["import pumice.prune.run", "import pumice; pumice.methods()", "import pumice; pumice.prune"]
)
def test_the_folder_prune_does_not_hide_the_function(first):
    code = f"{first}\nimport pumice, inspect\nfrom pumice import prune\nfrom pumice.prune.axes import Axes\n"
    code += "import pumice.prune.axes as axes\n"
    code += "assert callable(pumice.prune) and prune is pumice.prune and axes.Axes is Axes\n"
    code += "assert 'density' in inspect.signature(pumice.prune).parameters"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr
