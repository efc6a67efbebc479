"""Recipes: a well-known method is a row over the axes of `pumice.prune`, written as YAML, data only.

The dataclass `Recipe` is the one schema: YAML keys, the options of `pumice prune` and the docs come from its fields.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any

from pumice.core.errors import PumiceError

Spec = str | dict[str, Any]
DEFAULT = "alps-dense"
"""What method "auto" means: the best recipe of docs/quality.md."""
AXES = ("score", "recover", "allocation", "goal", "values")
USUAL = {"recover": "none", "allocation": "uniform", "goal": "layer", "values": "none"}
"""What an axis is where a recipe does not name it."""
PLACEMENT = ("pattern", "density", "targets", "ignore", "sequential")
RUN = ("samples", "seqlen", "seed", "data", "compute")
ABOUT = ("name", "summary", "paper", "key")


@dataclass(frozen=True)
class Recipe:
    """One method: which score, recovery and allocation, on which pattern; None leaves `pumice.prune`'s own default."""

    score: Annotated[Spec, "how weights are scored (pumice methods score)"]
    recover: Annotated[Spec | None, "how the kept weights make up for the pruned ones (pumice methods recover)"] = None
    allocation: Annotated[Spec | None, "how the density is shared between layers (pumice methods allocation)"] = None
    goal: Annotated[Spec | None, "whose outputs a pruned layer reproduces (pumice methods goal)"] = None
    values: Annotated[Spec | None, "what the kept weights are rounded to (pumice methods values)"] = None
    pattern: Annotated[str | None, "which zeros are legal: unstructured, 2:4, 16x32, row, column, …"] = None
    density: Annotated[float | None, "share of weights to keep in each pruned layer, in (0, 1]; N:M fixes it"] = None
    targets: Annotated[tuple[str, ...] | None, "names of layers to prune, * allowed"] = None
    ignore: Annotated[tuple[str, ...] | None, "names of layers to leave dense, * allowed"] = None
    sequential: Annotated[bool | None, "calibrate a block's layers one after the other, on what is pruned before"] = (
        None
    )
    samples: Annotated[int | None, "calibration windows"] = None
    seqlen: Annotated[int | None, "tokens in each calibration window"] = None
    seed: Annotated[int | None, "seed of the calibration draw and of random scores"] = None
    data: Annotated[str | None, "calibration text: file or Hugging Face dataset (default: text of Python)"] = None
    compute: Annotated[str | None, "matrix products while calibrating: auto, float32 or bfloat16"] = None
    name: Annotated[str, "name of the recipe"] = ""
    summary: Annotated[str, "one sentence"] = ""
    paper: Annotated[str | None, "where it is from"] = None
    key: Annotated[str | None, "catalogue key, where it realises a row"] = None
    path: Path | None = field(default=None, compare=False, repr=False)

    def axes(self) -> dict[str, Any]:
        """Keyword arguments of `pumice.prune` that decide the method and where it is applied."""
        return {name: getattr(self, name) for name in (*AXES, *PLACEMENT) if getattr(self, name) is not None}

    def run(self) -> dict[str, Any]:
        """Keyword arguments of `pumice.prune` that decide how it is calibrated."""
        return {name: getattr(self, name) for name in RUN if getattr(self, name) is not None}

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as the YAML has them."""
        values = {name: getattr(self, name) for name in schema()}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value not in (None, "")
        }


@dataclass(frozen=True)
class Field:
    """One key of the schema: its type without None, its help, and whether it must be given."""

    name: str
    type: Any
    help: str
    required: bool


@cache
def schema() -> dict[str, Field]:
    """The keys that a recipe may have, in order."""
    hints = typing.get_type_hints(Recipe, include_extras=True)
    found = {}
    for one in fields(Recipe):
        hint = hints[one.name]
        if typing.get_origin(hint) is not Annotated:
            continue
        kind, text = typing.get_args(hint)[:2]
        if isinstance(kind, UnionType):
            arms = [arm for arm in typing.get_args(kind) if arm is not type(None)]
            kind = arms[0] if len(arms) == 1 else Spec
        found[one.name] = Field(one.name, kind, text, one.name == "score")
    return found


def folder() -> Path:
    """Where the recipes lie: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


@cache
def _shipped() -> dict[str, Recipe]:
    found = {file.stem: read_recipe(file) for file in sorted(folder().glob("*.yaml"), key=lambda file: file.stem)}
    for stem, recipe in found.items():
        if recipe.name != stem:
            raise PumiceError(f"recipe file {stem}.yaml names itself {recipe.name!r}: make the two equal.")
    return found


def recipes() -> list[Recipe]:
    """The recipes that come with Pumice, by name."""
    return list(_shipped().values())


def load_recipe(source: str | Path) -> Recipe:
    """A recipe by its name, or from a YAML file.

    Raises:
        PumiceError: no such recipe or file, or one that breaks the schema.
    """
    if isinstance(source, Path) or _is_file_name(source):
        return read_recipe(Path(source).expanduser())
    if source not in _shipped():
        from pumice.core.registry import unknown

        raise PumiceError(unknown("recipe", source, _shipped()))
    return _shipped()[source]


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file; PumiceError names the file and what is wrong in it."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PumiceError(
            f"recipe={str(path)!r} cannot be read ({error.strerror or error}): name a YAML file."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise PumiceError(f"recipe={str(path)!r} is not plain YAML ({reason}): write keys and values only.") from error
    if not isinstance(content, dict):
        raise PumiceError(f"recipe={str(path)!r} holds a {type(content).__name__}: write one `key: value` a line.")
    return from_dict(content, source=f"recipe {str(path)!r}", name=path.stem, path=path)


def from_dict(
    content: Mapping[Any, Any], *, source: str = "recipe", name: str = "", path: Path | None = None
) -> Recipe:
    """A recipe from plain data.

    Raises:
        PumiceError: unknown key (the known ones are listed), a value of the wrong type, or no score.
    """
    from pumice.core.registry import unknown

    known = schema()
    values: dict[str, Any] = {"name": name, "path": path}
    for key, value in content.items():
        if key not in known:
            raise PumiceError(unknown(f"key of {source}", str(key), known))
        if value is not None:
            values[key] = _checked(known[key], value, source)
    if "score" not in values:
        raise PumiceError(f"{source} has no score: write `score: NAME` (pumice methods score lists them).")
    return Recipe(**values)


def _is_file_name(text: str) -> bool:
    return text.endswith((".yaml", ".yml"))


def _checked(one: Field, value: Any, source: str) -> Any:
    """A value of the field's type; PumiceError otherwise. YAML's `1e-2` is text, hence float() on text."""

    def wrong(wanted: str) -> PumiceError:
        return PumiceError(f"{source}: {one.name}={value!r} must be {wanted}.")

    if one.type == Spec:
        if not isinstance(value, (str, Mapping)):
            raise wrong("a name, or {name: NAME, option: value}")
        return value if isinstance(value, str) else dict(value)
    if one.type is bool:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if one.type is str:
        # An unquoted 2:4 is the number 124 to YAML 1.1 (base 60).
        if not isinstance(value, str):
            raise wrong("text; put it in quotes")
        return value
    if one.type in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise wrong("a number")
        try:
            number = float(value)
        except ValueError:
            raise wrong("a number") from None
        if one.type is int and not number.is_integer():
            raise wrong("a whole number")
        return one.type(number)
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(item, str) for item in names):
        raise wrong("a list of names")
    return tuple(names)


def find(method: str | Path | Recipe = "auto") -> Recipe:
    """What a method name means: "auto", a recipe, a YAML file, or a bare score without recovery.

    Raises:
        PumiceError: none of these; all are listed, the nearest first.
    """
    if isinstance(method, Recipe):
        return method
    if isinstance(method, Path) or _is_file_name(method):
        return load_recipe(method)
    if method == "auto":
        return _shipped()[DEFAULT]
    if method in _shipped():
        return _shipped()[method]
    from pumice.core import registry

    scorers = {info.name: info for info in registry.scorer.members()}
    if method not in scorers:
        raise PumiceError(registry.unknown("method", method, {"auto", *_shipped(), *scorers}))
    info = scorers[method]
    return Recipe(score=method, name=method, summary=info.summary, paper=info.paper, key=info.key)


def resolve(method: str | Path | Recipe = "auto", **overrides: Any) -> dict[str, Any]:
    """Keyword arguments of `Axes.make` for a method, with what the caller gave explicitly in place of the recipe's.

    None, and an `ignore` equal to the default, count as not given. A recipe's density gives way to a pattern that the
    caller names and that fixes its own, and to an allocation with a budget. A recipe whose axes are overridden is another method: it says so in its
    name and loses its catalogue key.

    Raises:
        PumiceError: unknown method or argument.
    """
    from pumice.core.registry import family, unknown
    from pumice.core.view import DEFAULT_IGNORE

    recipe = find(method)
    for name in overrides:
        if name not in (*AXES, *PLACEMENT):
            raise PumiceError(unknown("argument", name, (*AXES, *PLACEMENT)))
    given = {name: value for name, value in overrides.items() if value is not None}
    if tuple(given.get("ignore", ())) == DEFAULT_IGNORE:
        del given["ignore"]
    base = {"recover": USUAL["recover"], **recipe.axes()}
    if "density" not in given and (
        ("pattern" in given and _fixes_density(given["pattern"]))
        or ("allocation" in given and _has_budget(given["allocation"]))
    ):
        base.pop("density", None)
    usual = {**USUAL, **base}
    bound = {axis: family(axis).bind(given[axis]) for axis in AXES if axis in given}
    changed = [axis for axis in bound if _spec(given[axis]) != _spec(usual[axis])]
    name = " + ".join([recipe.name, *(f"{axis} {bound[axis].name}" for axis in changed)])
    usual_order = base.get("sequential", False)
    changed += [] if given.get("sequential", usual_order) == usual_order else ["sequential"]
    return {**base, **given, "name": name, "key": None if changed else recipe.key}


def _fixes_density(pattern: Any) -> bool:
    from pumice.weights.patterns.base import parse

    try:
        parse(pattern).density(None)
    except PumiceError:
        return False
    return True


def _has_budget(allocation: Any) -> bool:
    from pumice.core.registry import family

    bound = family("allocation").bind(allocation)
    own = bound.info.extras["density"]
    return own is not None and own(None, bound.values) is not None


def _spec(value: Any) -> dict[str, Any]:
    """A method and its options in one form: `"obs"` as `{"name": "obs"}`."""
    return {"name": value} if isinstance(value, str) else dict(value or {})


def set_options(method: str | Path | Recipe, axes: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """`axes` with settings like `recover.damp=0.05` applied to what the method and `axes` choose on that axis.

    Raises:
        PumiceError: a setting that is not AXIS.OPTION=VALUE, an axis without a method, or an unknown option.
    """
    from pumice.core import registry

    result = dict(axes)
    base = find(method).axes()
    for setting in settings:
        target, equals, value = setting.partition("=")
        axis, dot, option = target.strip().partition(".")
        if not (equals and dot and option) or axis not in AXES:
            raise PumiceError(
                f"set={setting!r} is not AXIS.OPTION=VALUE with AXIS one of {', '.join(AXES)}: write recover.damp=0.05."
            )
        spec = _spec(result.get(axis) or base.get(axis))
        if not spec:
            raise PumiceError(f"set={setting!r}: the method chooses no {axis}; name one with --{axis} first.")
        options = registry.family(axis).get(str(spec["name"])).bind({option: value.strip()}).options
        result[axis] = {**spec, **options}
    return result
