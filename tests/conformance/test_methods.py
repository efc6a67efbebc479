"""Every score x recovery x pattern x allocation of the registry: it prunes as asked, or says why it will not."""

import copy
import itertools
import types

import pytest
import torch
from torch import nn

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.core.view import find_views
from pumice.prune.axes import Axes
from pumice.prune.run import Pruner
from pumice.recipe import AXES, USUAL
from pumice.weights.grid import kept
from tests import tiny

SCORES = [info.name for info in registry.methods("score")]
RECOVERIES = [info.name for info in registry.methods("recover")]
ALLOCATIONS = [info.name for info in registry.methods("allocation")]
PATTERNS = ["unstructured", "unstructured:global"]
PATTERNS += [info.obj.examples[0] for info in registry.methods("pattern") if info.name not in ("unstructured", "block")]
PATTERNS += ["4x8", "4x4:row"]
TOKENS = torch.randint(4, 100, (3, 20), generator=torch.Generator().manual_seed(0))


def plain():
    """Layers of every kind: linear, convolution, grouped and depthwise convolution."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 1),
        nn.Tanh(),
        nn.Conv2d(16, 16, (1, 2), groups=2),
        nn.Conv2d(16, 16, (2, 4), padding=(1, 2), groups=16),
        nn.Flatten(),
        nn.Linear(16 * 5 * 4, 32),
        nn.Linear(32, 16),
    )


def images():
    x = torch.randn(12, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    return [x[:6], x[6:]]


def axes_of(score, recover="none", pattern="unstructured", allocation=None, density=0.5):
    fixed = pattern[0].isdigit() and ":" in pattern and "x" not in pattern
    return Axes.make(score, recover=recover, pattern=pattern, allocation=allocation, density=None if fixed else density)


def attempt(*given):
    """The axes, or None and why they are refused."""
    try:
        return axes_of(*given), ""
    except PumiceError as error:
        return None, str(error)


def prune(model, axes, batches, seed=0):
    given = {"loss": lambda m, b: m(b).square().mean()} if isinstance(batches[0], torch.Tensor) else {}
    return Pruner(model, axes, batches, seed=seed, progress=False, **given).run()


def check(model, before, result, axes):
    """Legal masks, the density that was asked, shapes and dtypes as before, nothing else touched."""
    pruned = {layer.name for layer in result.layers}
    for name, parameter in model.named_parameters():
        old = before[name]
        assert (parameter.shape, parameter.dtype) == (old.shape, old.dtype)
        assert torch.isfinite(parameter).all()
        if name not in pruned:
            assert torch.equal(parameter, old)
    for layer in result.layers:
        w = model.get_parameter(layer.name).detach().flatten(1)
        module = model.get_submodule(layer.name.removesuffix(".weight"))
        kernel = w.shape[1] // module.weight.shape[1] if w.dim() == 2 and module.weight.dim() > 2 else 1
        assert axes.pattern.fit(kernel).verify(w != 0)
        assert layer.density == pytest.approx((w != 0).float().mean().item(), abs=1e-6)
        assert layer.method == axes.name
        assert layer.error is None or 0 <= layer.error < 3
        assert (layer.weight_error > 0) == (layer.density < 1)
        assert layer.weight_error < 3


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("recover", RECOVERIES)
@pytest.mark.parametrize("score", SCORES)
def test_every_score_recovery_and_pattern(score, recover, pattern):
    model = plain()
    before = copy.deepcopy(model.state_dict())
    axes, refused = attempt(score, recover, pattern)
    if axes is None:
        assert recover in refused
        assert pattern in refused
        return
    batches = images()
    result = prune(model, axes, batches)
    check(model, before, result, axes)
    coarse = {"4x8": 1 / 2, "4x4:row": 1 / 2, "row": 1 / 16, "column": 1 / 8, "channel": 1 / 8}.get(pattern, 0.03)
    if pattern != "unstructured:global":
        for layer in result.layers:
            assert axes.density - 1e-6 <= layer.density <= axes.density + coarse + 1e-6, layer
    again = plain()
    prune(again, axes, batches)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)), "deterministic"


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("score", SCORES)
def test_every_allocation(score, allocation):
    for recover, pattern in itertools.product(RECOVERIES, ["unstructured:layer", "2:4"]):
        axes, refused = attempt(score, recover, pattern, allocation)
        if axes is None:
            assert allocation in refused
            continue
        model = tiny.llama()
        before = copy.deepcopy(model.state_dict())
        result = prune(model, axes, [{"input_ids": TOKENS}])
        check(model, before, result, axes)
        assert result.density == pytest.approx(0.5, abs=1e-3)
        for layer in result.layers:
            assert layer.density == pytest.approx(layer.asked, abs=2e-3)


@pytest.mark.parametrize("goal", [info.name for info in registry.methods("goal")])
@pytest.mark.parametrize("recover", RECOVERIES)
def test_every_goal(recover, goal):
    axes = Axes.make("wanda", recover=recover, goal=goal, density=0.5)
    for model, batches in ((tiny.llama(), [{"input_ids": TOKENS}]), (plain(), images())):
        before = copy.deepcopy(model.state_dict())
        check(model, before, prune(model, axes, batches), axes)


@pytest.mark.parametrize("values", [info.name for info in registry.methods("values")])
@pytest.mark.parametrize("recover", RECOVERIES)
def test_every_values(recover, values):
    spec = values if values in ("none", "int8") else {"name": values, "group": 16}
    axes = Axes.make("wanda", recover=recover, values=spec, density=0.5)
    model = tiny.llama()
    prune(model, axes, [{"input_ids": TOKENS}])
    for view in find_views(model):
        grid = kept([view])
        assert (grid is None) == (values == "none")
        assert grid is None or grid.fits(view.matrix())
        assert 0.35 < (view.matrix() != 0).float().mean() <= 0.51


@pytest.mark.parametrize("score", SCORES)
def test_the_seed_matters_only_where_there_is_chance(score):
    results = []
    for seed in (0, 0, 1):
        model = plain()
        prune(model, axes_of(score), images(), seed)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2]) != (score == "random")


@pytest.mark.parametrize("score", SCORES)
def test_every_score_prunes_half_precision(score):
    model = tiny.llama().to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    axes = axes_of(score, "obs")
    result = prune(model, axes, [{"input_ids": TOKENS}])
    check(model, before, result, axes)
    assert result.density == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("recover", RECOVERIES)
def test_density_one_changes_nothing(recover):
    model = tiny.llama()
    before = copy.deepcopy(model.state_dict())
    result = prune(model, axes_of("magnitude", recover, density=1.0), [{"input_ids": TOKENS}])
    assert result.density == 1.0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("info", registry.methods(), ids=lambda info: f"{info.family}-{info.name}")
def test_every_method_explains_itself(info):
    assert info.summary
    assert info.summary[-1] in ".)" or len(info.summary) > 20
    if info.family in AXES and info.name not in USUAL.values():
        assert info.paper, f"{info.name} names no paper"
    for option in info.options.values():
        assert isinstance(option.type, type | types.UnionType), (
            f"option {option.name} of {info.name} needs a plain type"
        )
        assert isinstance(option.default, option.type | type(None))
        if info.family in AXES:
            assert option.help, f"option {option.name} of {info.name} has no help"
            assert option.coerce(str(option.default), "text") == option.default


REFUSED = [
    ({"score": "wanda", "allocation": "owl", "pattern": "2:4"}, "N:M pattern fixes the density"),
    ({"score": "wanda", "allocation": "lamp", "density": 0.5}, "use score='magnitude'"),
    ({"score": "wanda", "recover": "dsnot", "pattern": "4x4", "density": 0.5}, "moves single weights"),
    ({"score": "wanda", "recover": "dsnot", "pattern": "row", "density": 0.5}, "moves single weights"),
    (
        {"score": "magnitude", "pattern": "unstructured:global", "allocation": "er", "density": 0.5},
        "leave one of them out",
    ),
    ({"score": {"name": "obs", "damp": 0.1}, "recover": "obs", "density": 0.5}, "give them to recover"),
    ({"score": "magnitude", "pattern": "2:4", "density": 0.7}, "contradicts"),
]


@pytest.mark.parametrize(("given", "reason"), REFUSED)
def test_what_makes_no_sense_is_refused_with_the_reason(given, reason):
    with pytest.raises(PumiceError, match=reason):
        Axes.make(**given)


def test_a_global_pattern_takes_options_of_its_allocation():
    axes = Axes.make(
        "magnitude", pattern="unstructured:global", allocation={"name": "global", "minimum": 0.1}, density=0.5
    )
    assert axes.allocation.options == {"minimum": 0.1}
    assert Axes.make("magnitude", pattern="unstructured:global", density=0.5).allocation.name == "global"


def test_the_description_names_everything_that_decides_the_result():
    axes = Axes.make("wanda", recover={"name": "obs", "damp": 0.1}, density=0.5, targets="fc*")
    assert axes.describe() == {
        "name": "wanda",
        "score": {"name": "wanda"},
        "recover": {"name": "obs", "damp": 0.1, "block": 128, "joint": True},
        "allocation": {"name": "uniform"},
        "goal": {"name": "layer"},
        "values": {"name": "none"},
        "pattern": "unstructured:row",
        "density": 0.5,
        "targets": ["fc*"],
        "ignore": ["lm_head", "embed*"],
        "sequential": False,
    }
