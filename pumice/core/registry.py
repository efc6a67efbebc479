"""Methods register themselves by a decorator; everything else (CLI, docs, tests) asks here what exists."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

from pumice.core.errors import PumiceError


@dataclass(frozen=True)
class Option:
    """One keyword-only parameter of a method: the same object makes the YAML schema, the CLI help and the docs."""

    name: str
    type: Any
    default: Any
    help: str = ""

    def coerce(self, value: Any, owner: str) -> Any:
        """`value` as this option's type (text from the command line included); PumiceError when it is not one."""
        if self.default is None and (value is None or (isinstance(value, str) and value.lower() == "none")):
            return None
        if not isinstance(self.type, type):
            return value
        try:
            if value is None:
                raise TypeError
            if self.type is bool and isinstance(value, str):
                return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
            if self.type in (int, float) and isinstance(value, bool):
                raise TypeError
            if self.type is int and float(value) != int(float(value)):
                raise ValueError
            return self.type(value)
        except (TypeError, ValueError, KeyError, OverflowError):
            kind = self.type.__name__
            raise PumiceError(f"option {self.name}={value!r} of {owner} must be of type {kind}.") from None


@dataclass(frozen=True)
class MethodInfo:
    """What the registry knows of one method."""

    family: str
    name: str
    obj: Any = field(repr=False)
    key: str | None = None
    paper: str | None = None
    needs: tuple[str, ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.obj) or "").split("\n")[0]

    def bind(self, options: Mapping[str, Any] | None = None) -> Bound:
        """The method with its options checked and set.

        Raises:
            PumiceError: an option that the method does not have, or of the wrong type.
        """
        given = dict(options or {})
        owner = f"{self.family} {self.name!r}"
        for name in given:
            if name not in self.options:
                raise PumiceError(unknown(f"option of {owner}", name, self.options))
        return Bound(self, {name: self.options[name].coerce(value, owner) for name, value in given.items()})


@dataclass(frozen=True)
class Bound:
    """A method and its options, ready to call."""

    info: MethodInfo
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def values(self) -> dict[str, Any]:
        """Every option's value, defaults included."""
        return {**{name: option.default for name, option in self.info.options.items()}, **self.options}

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the method needs with these options."""
        more = self.info.extras.get("option_needs")
        return frozenset(self.info.needs) | frozenset(more(self.values) if more is not None else ())

    def __call__(self, *args: Any) -> Any:
        return self.info.obj(*args, **self.options)

    def describe(self) -> dict[str, Any]:
        """Name and every option's value, defaults included, for reports."""
        return {"name": self.name, **self.values}


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Message for an unknown name: the nearest known one, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}: {hint}Known: {', '.join(names) if names else 'none'}."


def _options(obj: Any) -> dict[str, Option]:
    target = obj.__init__ if inspect.isclass(obj) else obj
    try:
        hints = typing.get_type_hints(target, include_extras=True)
    except NameError:
        hints = {}
    found = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint, text = hints.get(name, Any), ""
        if typing.get_origin(hint) is typing.Annotated:
            hint, *notes = typing.get_args(hint)
            text = next((note for note in notes if isinstance(note, str)), "")
        arms = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        if typing.get_origin(hint) in (UnionType, typing.Union) and len(arms) == 1:
            hint = arms[0]
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        found[name] = Option(name, hint, default, text)
    return found


class Family:
    """An open set of methods of one kind: calling it gives the decorator that adds one.

    `package` is imported module by module the first time somebody asks, so that a new file is a new method and
    nothing else has to know of it. `extras` are further facts that a member may state, with their defaults; every family
    has `simpler`, the method whose results a member has to beat (None: the family's plainest).
    """

    def __init__(self, name: str, package: str, **extras: Any) -> None:
        self.name, self.package, self.extras = name, package, {"simpler": None, **extras}
        self._members: dict[str, MethodInfo] = {}
        self._discovered = False

    def __call__(
        self, name: str, *, key: str | None = None, paper: str | None = None, needs: tuple[str, ...] = (), **extras: Any
    ) -> Callable[[Any], Any]:
        """Decorator that registers a function or class as `name` of this family."""
        for extra in extras:
            if extra not in self.extras:
                raise PumiceError(unknown(f"fact of family {self.name}", extra, self.extras))

        def register(obj: Any) -> Any:
            old = self._members.get(name)
            if old is not None and (old.obj.__module__, old.obj.__qualname__) != (obj.__module__, obj.__qualname__):
                raise PumiceError(
                    f"{self.name} {name!r} is registered twice, in {old.obj.__module__} and {obj.__module__}: rename one."
                )
            if not inspect.getdoc(obj):
                raise PumiceError(
                    f"{self.name} {name!r} in {obj.__module__} has no docstring: say in one sentence what it does."
                )
            self._members[name] = MethodInfo(
                self.name, name, obj, key, paper, tuple(needs), {**self.extras, **extras}, _options(obj)
            )
            return obj

        return register

    def discover(self) -> None:
        """Import every module of the family's package once.

        Raises:
            PumiceError: a module does not import; the message names its file, since a method that silently
                disappears is worse than a program that does not start.
        """
        if self._discovered:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__, prefix=f"{self.package}."):
            try:
                importlib.import_module(module.name)
            except Exception as error:
                path = "/".join(module.name.split(".")) + ".py"
                raise PumiceError(f"method file {path} does not import: {type(error).__name__}: {error}.") from error
        self._discovered = True

    def get(self, name: str) -> MethodInfo:
        """The member called `name`; PumiceError with the nearest known name if there is none."""
        self.discover()
        if name not in self._members:
            raise PumiceError(unknown(self.name, name, self._members))
        return self._members[name]

    def of(self, instance: Any) -> MethodInfo | None:
        """The member whose class made `instance`, or None."""
        return next((info for info in self.members() if info.obj is type(instance)), None)

    def members(self) -> list[MethodInfo]:
        self.discover()
        return [self._members[name] for name in sorted(self._members)]

    def bind(self, spec: str | Mapping[str, Any]) -> Bound:
        """`"owl"` or `{"name": "owl", "lam": 0.1}` as a bound method; PumiceError for anything else."""
        if isinstance(spec, str):
            return self.get(spec).bind()
        if not isinstance(spec, Mapping):
            raise PumiceError(f"{self.name}={spec!r} is no method: write its name, or {{name: METHOD, option: value}}.")
        options = dict(spec)
        if "name" not in options:
            raise PumiceError(f"{self.name}={dict(spec)!r} has no 'name': write {{name: METHOD, option: value}}.")
        return self.get(str(options.pop("name"))).bind(options)


scorer = Family("score", "pumice.prune.score", scope="layer")
recovery = Family("recover", "pumice.prune.recover", selects=False, patterns=None, rounds=False)
allocation = Family(
    "allocation",
    "pumice.prune.allocate",
    compares_score=False,
    streams=False,
    option_needs=None,
    density=None,
    passes=None,
)
goal = Family("goal", "pumice.prune.goal")
values = Family("values", "pumice.prune.values")
repair = Family("repair", "pumice.prune.repair", minutes=None, integers=False)
shrink = Family("shrink", "pumice.prune.shrink")
rewrite = Family("rewrite", "pumice.prune.rewrite", patterns=None)
pattern = Family("pattern", "pumice.weights.patterns", grammar="")
layout = Family("layout", "pumice.weights.layouts", storable=True)
# Facts of routers.
#   gradient: how its parameters learn: "weight" (through combine weights), "loss" (only through losses), "none".
#   columns: what its scores have columns for: "experts", "candidates" of each token, or "slots" of the experts.
#   causal: a token's scores do not depend on other tokens. chance: it draws random numbers in training.
#   trains: training changes its state or makes it compute something else than evaluation. forbids: sets `allowed_TE`.
#   kind: the one kind of experts that it looks at, or None.
router = Family(
    "router",
    "pumice.moe.route",
    gradient="weight",
    columns="experts",
    causal=True,
    chance=False,
    trains=False,
    forbids=False,
    kind=None,
)
# Facts of assignments: as above, where columns and forbids say what it takes.
#   makes: "plan", "dense" or "merge". balanced: loads are equal by construction.
assign = Family(
    "assign",
    "pumice.moe.assign",
    makes="plan",
    columns=("experts",),
    causal=True,
    balanced=False,
    chance=False,
    trains=False,
    forbids=True,
)
# weight: the loss's usual factor. router: the one router whose partial results it reads. taps: it watches the experts'
# hidden states (`Plan.tap`).
balance = Family("balance", "pumice.moe.balance", weight=0.01, router=None, taps=False)
# merges: the parameters of several experts can be averaged. router: the one router that prepares its work, or None.
experts = Family("experts", "pumice.moe.experts", merges=True, router=None)
moe_layer = Family("moe_layer", "pumice.moe.composite")
FAMILIES = {one.name: one for one in list(globals().values()) if isinstance(one, Family)}


def family(name: str) -> Family:
    """The family called `name`."""
    if name not in FAMILIES:
        raise PumiceError(unknown("family", name, FAMILIES))
    return FAMILIES[name]


def methods(name: str | None = None) -> list[MethodInfo]:
    """Everything registered, of one family or of all."""
    chosen = FAMILIES.values() if name is None else [family(name)]
    return [info for one in chosen for info in one.members()]
