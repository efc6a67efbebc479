"""Recipes: every shipped one prunes, the schema refuses what it must, a method name means what the design says."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import torch

from pumice import recipe as recipes
from pumice.core.errors import PumiceError
from pumice.prune.axes import Axes
from pumice.prune.run import Pruner
from tests import tiny

NAMES = [one.name for one in recipes.recipes()]
WELL_KNOWN = {"magnitude", "wanda", "wanda-2to4", "sparsegpt", "sparsegpt-2to4", "owl-70", "dsnot-70"}


def axes(name, **given):
    found = recipes.find(name)
    if found.density is None and found.pattern is None:
        given = {"density": 0.5, **given}
    return Axes.make(**recipes.resolve(name, **given))


def test_the_well_known_ones_are_there():
    assert set(NAMES) >= WELL_KNOWN


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_prunes_a_model_to_its_density(name):
    model = tiny.llama()
    windows = torch.randint(0, 100, (4, 32), generator=torch.Generator().manual_seed(0))
    result = Pruner(model, axes(name), [{"input_ids": row[None]} for row in windows], progress=False).run()
    expected = {"2:4": 0.5}.get(recipes.find(name).pattern or "", recipes.find(name).density or 0.5)
    assert len(result.layers) == 14
    # A row of 32 weights can be no nearer to its density than one weight; of kept weights some are rounded to zero.
    rounded = recipes.find(name).values is not None
    assert expected - (0.12 if rounded else 1 / 32) <= result.density <= expected + 1 / 32
    if recipes.find(name).pattern == "2:4":
        kept = (model.model.layers[1].mlp.up_proj.weight != 0).unflatten(1, (-1, 4)).sum(-1)
        assert int(kept.max()) <= 2


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_is(name):
    found = recipes.find(name)
    assert found.summary.endswith(".")
    assert found.paper
    assert found.path is not None
    assert found.path.stem == name


def test_recipes_with_catalogue_keys():
    keys = {one.name: one.key for one in recipes.recipes() if one.key}
    assert keys == {"dsnot-70": "dsnot", "lamp": "lamp", "global-mp": "global-mp", "gqsa": "gqsa"}
    assert axes("dsnot-70").recover.name == "dsnot"
    assert axes("lamp").allocation.name == "lamp"
    assert axes("global-mp").allocation.name == "global"


def test_sparsegpt_is_obs_twice_and_auto_means_it():
    assert axes("auto") == axes("alps-dense")
    found = axes("sparsegpt")
    assert (found.score.name, found.recover.name, found.selects_itself) == ("obs", "obs", True)


def test_a_score_is_a_method_without_recovery():
    found = axes("fisher")
    assert (found.score.name, found.recover.name, found.allocation.name) == ("fisher", "none", "uniform")


def test_given_arguments_override_the_recipe():
    found = axes("wanda", recover="obs", allocation={"name": "owl", "lam": 0.05}, density=0.4)
    assert (found.score.name, found.recover.name, found.density) == ("wanda", "obs", 0.4)
    assert found.allocation.options == {"lam": 0.05}
    assert found.name == "wanda + recover obs + allocation owl"


def test_repeating_the_recipe_changes_nothing():
    assert recipes.resolve("magnitude", recover="none", allocation="uniform")["name"] == "magnitude"
    assert recipes.resolve("dsnot-70", recover="dsnot")["key"] == "dsnot"
    assert recipes.resolve("dsnot-70", recover="obs")["key"] is None


def test_the_default_ignore_counts_as_not_given(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("score: wanda\nignore: [lm_head, '*down_proj']\n")
    assert recipes.resolve(file, ignore=("lm_head", "embed*"))["ignore"] == ("lm_head", "*down_proj")
    assert recipes.resolve(file, ignore=["q_proj"])["ignore"] == ["q_proj"]
    assert recipes.resolve(str(file))["name"] == "mine"


def test_a_pattern_that_fixes_the_density_replaces_the_recipes_own():
    assert axes("dsnot-70", pattern="2:4").density == 0.5
    assert axes("dsnot-70", pattern="unstructured:layer").density == 0.3
    with pytest.raises(PumiceError, match=r"density=0\.3 contradicts"):
        axes("dsnot-70", pattern="2:4", density=0.3)


def test_unknown_names_list_the_known_and_the_nearest():
    with pytest.raises(
        PumiceError, match=r"unknown method 'sparsgpt': did you mean 'sparsegpt'\? Known: alps, .*auto, .*wanda"
    ):
        recipes.resolve("sparsgpt")
    with pytest.raises(PumiceError, match=r"unknown recipe 'owl': .*owl-70"):
        recipes.load_recipe("owl")
    with pytest.raises(PumiceError, match="unknown argument 'densty': did you mean 'density'"):
        recipes.resolve("wanda", densty=0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "score: wanda\ndensty: 0.5\n",
            r"unknown key of recipe .*'densty': did you mean 'density'\? Known: allocation,",
        ),
        ("density: 0.5\n", "has no score"),
        ("score: 3\n", r"score=3 must be a name, or \{name: NAME"),
        ("score: wanda\npattern: 2:4\n", "pattern=124 must be text; put it in quotes"),
        ("score: wanda\ndensity: half\n", "density='half' must be a number"),
        ("score: wanda\ndensity: true\n", "density=True must be a number"),
        ("score: wanda\nsamples: 1.5\n", "samples=1.5 must be a whole number"),
        ("score: wanda\ntargets: {a: b}\n", "must be a list of names"),
        ("- score\n", "holds a list"),
        ("score: [\n", "is not plain YAML"),
        ("score: !!python/name:os.system\n", "is not plain YAML"),
    ],
)
def test_a_bad_recipe_file_is_refused_by_name(tmp_path, text, said):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(PumiceError, match=said) as caught:
        recipes.load_recipe(file)
    assert "bad.yaml" in str(caught.value)


def test_a_missing_recipe_file():
    with pytest.raises(PumiceError, match=r"recipe='nowhere.yaml' cannot be read"):
        recipes.find("nowhere.yaml")


def test_data_of_a_recipe_survives_the_round_trip():
    content = {
        "name": "mine",
        "score": {"name": "obs", "damp": 0.1},
        "recover": "none",
        "density": 0.25,
        "targets": ["mlp*"],
        "samples": 8,
        "compute": "float32",
    }
    found = recipes.from_dict(content)
    assert found.to_dict() == content
    assert found.run() == {"samples": 8, "compute": "float32"}
    assert Axes.make(**recipes.resolve(found)).score.options == {"damp": 0.1}


def test_options_of_methods_by_text():
    given = recipes.set_options("sparsegpt", {}, ["recover.damp=0.05", "recover.block=64", "score.damp=1e-3"])
    assert given == {"recover": {"name": "obs", "damp": 0.05, "block": 64}, "score": {"name": "obs", "damp": 0.001}}
    assert recipes.set_options("wanda", {"allocation": "owl"}, ["allocation.lam=0.1"])["allocation"]["lam"] == 0.1
    for setting, said in (
        ("recover.dam=1", "unknown option of recover 'obs' 'dam': did you mean 'damp'"),
        ("recover.damp=much", "must be of type float"),
        ("damp=1", "is not AXIS.OPTION=VALUE"),
        ("recover.damp", "is not AXIS.OPTION=VALUE"),
        ("allocation.lam=1", "chooses no allocation"),
    ):
        with pytest.raises(PumiceError, match=said):
            recipes.set_options("sparsegpt", {}, [setting])


@pytest.mark.parametrize("axis", recipes.AXES)
@pytest.mark.parametrize(("spec", "said"), [({"owl": {"lam": 1}}, "has no 'name'"), (["owl"], "is no method")])
def test_a_method_written_in_the_wrong_form(axis, spec, said):
    with pytest.raises(PumiceError, match=f"{axis}=.*{said}"):
        recipes.resolve("wanda", **{axis: spec})


def test_every_field_is_an_argument_of_prune():
    from pumice.engine.prune import prune

    arguments = set(inspect.signature(prune).parameters)
    assert set(recipes.schema()) - set(recipes.ABOUT) <= arguments
    assert {one.name for one in dataclasses.fields(recipes.Recipe)} == {*recipes.schema(), "path"}


def test_an_installed_package_finds_its_own_folder(tmp_path, monkeypatch):
    package = tmp_path / "pumice"
    (package / "recipes").mkdir(parents=True)
    monkeypatch.setattr(recipes, "__file__", str(package / "recipe.py"))
    assert recipes.folder() == package / "recipes"
    (package / "recipes").rmdir()
    assert recipes.folder() == tmp_path / "recipes"


def test_recipes_hold_nothing_of_this_machine():
    for one in recipes.recipes():
        assert isinstance(one.path, Path)
        assert json.loads(json.dumps(one.to_dict())) == one.to_dict()


def test_a_budget_of_an_allocation_takes_the_place_of_a_recipes_density():
    axes = recipes.resolve("owl-70", allocation={"name": "dp", "budget": "40MB"})
    assert "density" not in axes
    assert recipes.resolve("owl-70", allocation="dp")["density"] == 0.3
    assert recipes.resolve("owl-70", allocation={"name": "dp", "budget": "40MB"}, density=0.5)["density"] == 0.5
