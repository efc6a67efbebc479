"""The registry: discovery, options, and the errors that a user or an author of a method meets."""

import sys
from typing import Annotated

import pytest

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.core.registry import Family, Option


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An empty package of its own in which a test can put method files."""
    name = f"methods_of_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop(name, None)
    return name, folder


def test_a_new_file_is_a_new_method(package, monkeypatch):
    name, folder = package
    family = Family("thing", name)
    monkeypatch.setitem(registry.FAMILIES, "thing", family)
    (folder / "one.py").write_text(
        "from pumice.core.registry import FAMILIES\n"
        "@FAMILIES['thing']('one', key='row-1', paper='nobody 2020', needs=('input_mean',))\n"
        "def one(x, *, times: int = 2):\n    '''Says so.\n\n    More.'''\n    return x * times\n"
    )
    info = registry.family("thing").get("one")
    assert (info.key, info.paper, info.needs, info.summary) == ("row-1", "nobody 2020", ("input_mean",), "Says so.")
    assert info.bind()(3) == 6
    assert info.bind({"times": "5"})(3) == 15
    assert info.bind({"times": 5}).describe() == {"name": "one", "times": 5}
    assert info.bind().describe() == {"name": "one", "times": 2}
    assert registry.methods("thing") == [info]


@pytest.mark.parametrize("code", ["import no_such_module_anywhere", "def broken(:", "1 / 0"])
def test_an_import_error_is_fatal_every_time_and_names_the_file(package, code):
    name, folder = package
    (folder / "good.py").write_text("")
    (folder / "wrong.py").write_text(code)
    family = Family("thing", name)
    for _ in range(2):
        with pytest.raises(PumiceError, match=rf"{name}/wrong\.py"):
            family.members()
        with pytest.raises(PumiceError, match=r"wrong\.py"):
            family.get("anything")


def test_unknown_names_suggest_the_nearest_and_list_all():
    with pytest.raises(PumiceError, match="did you mean 'wanda'") as caught:
        registry.scorer.get("wnada")
    assert "magnitude" in str(caught.value)
    with pytest.raises(PumiceError, match="unknown family 'scorer'"):
        registry.family("scorer")
    with pytest.raises(PumiceError) as caught:
        registry.recovery.get("qqqqqqqq")
    assert "did you mean" not in str(caught.value)
    assert "obs" in str(caught.value)


def test_unknown_and_wrong_options():
    with pytest.raises(PumiceError, match="did you mean 'damp'"):
        registry.recovery.bind({"name": "obs", "dampp": 0.1})
    with pytest.raises(PumiceError, match="damp='much'"):
        registry.recovery.bind({"name": "obs", "damp": "much"})
    with pytest.raises(PumiceError, match=r"block=2\.5"):
        registry.recovery.bind({"name": "obs", "block": 2.5})
    with pytest.raises(PumiceError, match="damp=None"):
        registry.recovery.bind({"name": "obs", "damp": None})
    with pytest.raises(PumiceError, match="no 'name'"):
        registry.recovery.bind({"damp": 0.1})
    with pytest.raises(PumiceError, match="recover=3"):
        registry.recovery.bind(3)
    with pytest.raises(PumiceError, match="recover=None"):
        registry.recovery.bind(None)


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (int, "4", 4),
        (int, 4.0, 4),
        (float, "0.5", 0.5),
        (float, 1, 1.0),
        (bool, "no", False),
        (bool, "True", True),
        (str, 3, "3"),
    ],
)
def test_options_take_text(kind, given, expected):
    value = Option("x", kind, kind()).coerce(given, "nobody")
    assert value == expected
    assert type(value) is kind


@pytest.mark.parametrize(
    ("kind", "given"), [(int, "inf"), (int, True), (float, False), (bool, "maybe"), (int, "x"), (float, [1])]
)
def test_options_of_the_wrong_type_are_refused(kind, given):
    with pytest.raises(PumiceError, match=f"must be of type {kind.__name__}"):
        Option("x", kind, kind()).coerce(given, "nobody")


def test_registering_twice_is_refused_and_reloading_is_not():
    family = Family("thing", "pumice.prune.score")

    def make(module):
        def method(w):
            """A method."""

        method.__module__ = module
        return method

    family("same")(make("a"))
    family("same")(make("a"))
    with pytest.raises(PumiceError, match="registered twice, in a and b"):
        family("same")(make("b"))


def test_a_method_without_docstring_or_with_unknown_facts_is_refused():
    family = Family("thing", "pumice.prune.score", scope="layer")
    with pytest.raises(PumiceError, match="no docstring"):
        family("silent")(lambda w: w)
    with pytest.raises(PumiceError, match="did you mean 'scope'"):
        family("odd", scop="row")


def test_help_and_defaults_come_from_the_signature():
    family = Family("thing", "pumice.prune.score")

    @family("noted")
    def noted(w, stats, *, cycles: Annotated[int, "most rounds"] = 3, plain: float = 0.5):
        """A method."""

    options = family._members["noted"].options
    assert list(options) == ["cycles", "plain"]
    assert options["cycles"] == Option("cycles", int, 3, "most rounds")
    assert options["plain"] == Option("plain", float, 0.5, "")


def test_methods_lists_every_family():
    everything = registry.methods()
    assert {info.family for info in everything} <= set(registry.FAMILIES)
    assert len(everything) == sum(len(registry.methods(name)) for name in registry.FAMILIES)
    names = [info.name for info in registry.methods("score")]
    assert names == sorted(names)
