"""Recipes of MoE layers: a well-known layer is a row over the arguments of `MoE`, written as YAML in `recipes/moe`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pumice.core.errors import PumiceError
from pumice.core.registry import unknown

ABOUT = ("name", "summary", "paper", "key", "layer", "d_ff")


@dataclass(frozen=True)
class Recipe:
    """One layer: `arguments` are keyword arguments of `MoE`, `layer` is what is built around it, if anything."""

    name: str
    summary: str
    arguments: dict[str, Any]
    paper: str | None = None
    key: str | None = None
    layer: Any = None
    d_ff: int | None = None
    """The hidden width of an expert, where it belongs to the method."""


def folder() -> Path:
    """Where the recipes lie: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    return (inside if inside.is_dir() else package.parent / "recipes") / "moe"


@cache
def _shipped() -> dict[str, Recipe]:
    return {file.stem: read_recipe(file) for file in sorted(folder().glob("*.yaml"))}


def recipes() -> list[Recipe]:
    """The recipes that come with Pumice, by name."""
    return list(_shipped().values())


def load_recipe(source: str | Path) -> Recipe:
    """A recipe by its name, or from a YAML file.

    Raises:
        PumiceError: no such recipe or file, or one that breaks the schema.
    """
    if isinstance(source, Path) or source.endswith((".yaml", ".yml")):
        return read_recipe(Path(source).expanduser())
    if source not in _shipped():
        raise PumiceError(unknown("MoE recipe", source, _shipped()))
    return _shipped()[source]


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file; PumiceError names the file and what is wrong in it."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PumiceError(f"recipe={str(path)!r} cannot be read ({reason}): name a YAML file.") from error
    if not isinstance(content, dict):
        raise PumiceError(f"recipe={str(path)!r} holds a {type(content).__name__}: write one `key: value` a line.")
    known = (*ABOUT, *schema())
    for key in content:
        if key not in known:
            raise PumiceError(unknown(f"key of recipe {str(path)!r}", str(key), known))
    if content.get("name", path.stem) != path.stem:
        raise PumiceError(f"recipe file {path.name} names itself {content['name']!r}: make the two equal.")
    arguments = {key: value for key, value in content.items() if key not in ABOUT}
    about = {key: content.get(key) for key in ("paper", "key", "layer", "d_ff")}
    return Recipe(path.stem, str(content.get("summary", "")), arguments, **about)


def schema() -> tuple[str, ...]:
    """The keys that a recipe may have beside those that describe it: `MoE`'s own arguments."""
    from pumice.moe.layer import MoE

    given = inspect.signature(MoE.__init__).parameters
    return tuple(name for name in given if name not in ("self", "d_model", "d_ff", "dtype", "device"))
