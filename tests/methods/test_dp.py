"""Dynamic programming: equal to brute force, budgets kept, errors and sensitivities as they are defined."""

import itertools
import random

import pytest
import torch
from torch import nn

from pumice import prune
from pumice.core import select
from pumice.core.errors import PumiceError
from pumice.core.view import find_views
from pumice.prune.allocate import knapsack
from pumice.prune.allocate.base import Block, Cost, Layer
from pumice.prune.allocate.cost import read_budget
from pumice.prune.axes import Axes
from pumice.prune.run import Pruner
from pumice.report import disk_bytes
from tests import tiny
from tests.methods.layers import correlated, draw, error, recover, score, stats_of
from tests.methods.test_allocations import allocate, kept, mean, mlp

TOKENS = torch.randint(4, 100, (3, 24), generator=torch.Generator().manual_seed(0))


def brute_force(costs, errors, budget):
    best = None
    for choice in itertools.product(*(range(len(row)) for row in costs)):
        cost = sum(row[c] for row, c in zip(costs, choice, strict=True))
        total = sum(row[c] for row, c in zip(errors, choice, strict=True))
        if cost <= budget and (best is None or total < best):
            best = total
    return best


@pytest.mark.parametrize("seed", range(12))
def test_the_knapsack_is_as_good_as_brute_force(seed):
    draw_from = random.Random(seed)
    costs = [[draw_from.randint(1, 40) * 3 for _ in range(4)] for _ in range(5)]
    errors = [[draw_from.random() for _ in range(4)] for _ in range(5)]
    least, most = (sum(pick(row) for row in costs) for pick in (min, max))
    for budget in (least, least + 1, (least + most) // 2, most - 1, most + 7):
        chosen = knapsack.solve(costs, errors, budget)
        assert sum(row[c] for row, c in zip(costs, chosen, strict=True)) <= budget
        total = sum(row[c] for row, c in zip(errors, chosen, strict=True))
        assert total == pytest.approx(brute_force(costs, errors, budget))


def test_costs_that_fit_no_grid_never_break_the_budget(monkeypatch):
    monkeypatch.setattr(knapsack, "CELLS", 60)
    draw_from = random.Random(3)
    costs = [sorted(draw_from.random() for _ in range(6)) for _ in range(30)]
    errors = [sorted((draw_from.random() for _ in range(6)), reverse=True) for _ in range(30)]
    budget = 0.5 * (sum(row[0] for row in costs) + sum(row[-1] for row in costs))
    chosen = knapsack.solve(costs, errors, budget)
    spent = sum(row[c] for row, c in zip(costs, chosen, strict=True))
    assert spent <= budget
    cheapest_step = min(row[c + 1] - row[c] for row, c in zip(costs, chosen, strict=True) if c < 5)
    assert budget - spent < cheapest_step, "nothing more could be bought"


def test_a_budget_that_nothing_meets_is_refused():
    with pytest.raises(PumiceError, match="cheapest one costs 5"):
        knapsack.solve([[2, 9], [3, 4]], [[1, 0], [1, 0]], 4.9)


def white_walk(model):
    """A walk over layers with white inputs, so that the error of a mask is Σ pruned w²; and F = 1 everywhere."""

    def shown(view):
        w = view.read()
        stats = {"input": torch.eye(w.shape[1]) * w.shape[1] ** 0.5, "fisher_diag": torch.ones_like(w)}
        stats["input_sqnorm"] = torch.ones(w.shape[1])
        return Layer(view, w, stats, lambda d: select.layer(w.abs(), d), lambda d: w)

    def walk(visit):
        for view in find_views(model):
            visit(Block(view.name, lambda view=view: iter([shown(view)]), lambda: iter(())))

    return walk


@pytest.mark.parametrize("density", [0.3, 0.47, 0.5, 0.9, 1.0])
def test_with_equal_sensitivity_and_white_inputs_it_is_global_magnitude(density):
    """Σ pruned w² is least where all weights compete by magnitude, up to one step of the ladder."""
    model = mlp(1.0, 0.6, 2.0)
    options = {"errors": "score", "sensitivity": "fisher", "step": 0.05}
    found = allocate("dp", model, density, more={"walk": white_walk(model)}, **options)
    truth = allocate("global", model, density, minimum=0.0)
    for name in found:
        assert found[name] == pytest.approx(truth[name], abs=0.051)
    assert sum(kept(model, found).values()) == round(1200 * density)


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 16))


def asked(model, density=0.5, method="wanda", recovery="none", batches=None, **options):
    axes = Axes.make(method, recover=recovery, allocation={"name": "dp", **options}, density=density)
    given = batches or [correlated(200), correlated(200, seed=5)]
    target = {"loss": lambda m, b: (m(b) - b).square().mean()}
    return Pruner(model, axes, given, progress=False, **target).run()


@pytest.mark.parametrize("sensitivity", ["loss", "fisher", "none"])
@pytest.mark.parametrize("errors", ["score", "recover", "obs"])
def test_every_choice_keeps_the_budget(errors, sensitivity):
    model = chain()
    result = asked(model, recovery="obs", errors=errors, sensitivity=sensitivity)
    densities = {layer.name: layer.asked for layer in result.layers}
    assert mean(model, densities) == pytest.approx(0.5, abs=1e-3)
    assert len(set(densities.values())) > 1
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_that_the_loss_ignores_is_pruned_most():
    """Both halves have equal errors, but the loss looks at one of them only."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.left(x), self.right(x)

    for sensitivity in ("loss", "fisher"):
        axes = Axes.make("wanda", allocation={"name": "dp", "sensitivity": sensitivity}, density=0.5)
        model, x = Two(), correlated()
        goal = model.left(x).detach() + 0.3 * draw(len(x), 16)
        loss = {"loss": lambda m, b, goal=goal: (m(b)[0] - goal).square().mean() + 1e-6 * m(b)[1].square().mean()}
        result = Pruner(model, axes, [x], progress=False, **loss).run()
        left, right = (layer.asked for layer in result.layers)
        assert left > 0.8
        assert right < 0.2


def test_the_obs_estimate_is_the_error_after_one_compensated_weight():
    """For a single pruned weight the closed form is what OBS really leaves."""
    from pumice.prune.allocate.dp import _errors

    x = correlated(400)
    stats = stats_of(x)
    w = draw(1, 16)
    mask = torch.ones(1, 16, dtype=torch.bool)
    mask[0, int((w**2).argmin())] = False
    view = find_views(nn.Sequential(nn.Linear(16, 1)))[0]
    layer = Layer(view, w, stats, lambda density: mask, lambda density: w * mask)
    found = float(_errors(layer, [0.9375, 1.0], "obs")[0])
    h = torch.linalg.inv(stats["hessian"] + 0.01 * stats["hessian"].diagonal().mean() * torch.eye(16))
    index = int((~mask[0]).nonzero())
    assert found == pytest.approx(float(w[0, index] ** 2 / h[index, index]), rel=1e-4)
    new, _, _ = recover("obs", w, stats, scorer="magnitude", pattern="unstructured:row", density=15 / 16, block=1)
    left = float(error(x, w, new).sum()) / len(x)
    # The walk goes left to right and compensates with later columns only, so that it leaves no less.
    assert left >= 0.9 * found


def test_layer_errors_are_those_of_the_mask():
    from pumice.prune.allocate.dp import _errors

    x = correlated(64)
    w = draw(5, 16)
    view = find_views(nn.Sequential(nn.Linear(16, 5)))[0]
    scores = score("wanda", w, stats_of(x))
    layer = Layer(view, w, {"input": x}, lambda d: select.layer(scores, d), lambda d: w)
    found = _errors(layer, [0.25, 0.5, 1.0], "score")
    truth = error(x, w, w * select.layer(scores, 0.5)) / len(x)
    assert torch.allclose(found[1], truth.double(), rtol=1e-4)
    assert torch.equal(found[2], torch.zeros(5).double())
    assert _errors(layer, [0.25, 1.0], "recover").abs().sum() == 0


@pytest.fixture
def data():
    return TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.45, 0.6, 0.9])
def test_a_budget_in_bytes_holds_for_the_saved_files(tmp_path, data, share, dtype):
    model = tiny.llama(hidden_size=64, intermediate_size=128).to(dtype)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    budget = round(share * dense) + 10_000
    result = prune(
        model,
        "wanda",
        allocation={"name": "dp", "budget": f"{budget}B", "errors": "score"},
        data=data,
        out=tmp_path / "out",
        progress=False,
    )
    found = disk_bytes(tmp_path / "out")
    assert found <= budget
    assert result.density < 1
    assert budget - found < 0.12 * budget, "most of it is used"


def test_a_budget_of_bytes_or_time_below_the_smallest_names_it(tmp_path, data):
    model = tiny.llama()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(PumiceError, match=r"smallest possible is 0\.\d+MB"):
        prune(model, "wanda", allocation={"name": "dp", "budget": "1kB"}, data=data, out=tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(PumiceError, match=r"smallest possible is 0\.05"):
        prune(model, "wanda", allocation="dp", density=0.01, data=data)
    assert not (tmp_path / "out").exists()


def test_a_budget_in_time_is_met_by_the_sum_of_the_layers_times():
    """With known times the assignment is the best that fits."""
    model = mlp(1.0, 1.0, 1.0)
    rates = {"0": 5.0, "1": 1.0, "2": 1.0}
    times = Cost(lambda v, mask: rates[v.module_name] * float(mask.float().mean()), kind=lambda v: v.module_name)
    more = {"walk": white_walk(model), "costs": {"ms": lambda: times}}
    more["select"] = lambda view, scores, density: select.layer(scores, density)
    found = allocate("dp", model, 1.0, more=more, budget="3.5ms", errors="score", sensitivity="none")
    spent = 5 * found["0.weight"] + found["1.weight"] + found["2.weight"]
    assert 3.5 - 0.3 < spent <= 3.5
    assert found["0.weight"] < found["1.weight"], "the slow layer pays"
    with pytest.raises(PumiceError, match="knows what layers cost in ms"):
        allocate("dp", model, 1.0, budget="3ms")


def test_real_timings_come_from_the_engine(data):
    model = tiny.llama(num_hidden_layers=1)
    with pytest.raises(PumiceError, match=r"smallest possible is 0\.\d+ms"):
        prune(model, "wanda", allocation={"name": "dp", "budget": "0.00001ms", "errors": "score"}, data=data)
    allocation = {"name": "dp", "budget": "10s", "errors": "score"}
    assert prune(model, "wanda", allocation=allocation, data=data, progress=False).density == 1.0


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [("60MB", 6e7, "bytes"), ("1.5 GiB", 1.5 * 2**30, "bytes"), ("12ms", 12, "ms"), ("500us", 0.5, "ms"),
     ("40%", 0.4, "density"), ("0.4", 0.4, "density"), ("1e6B", 1e6, "bytes"), ("2s", 2000, "ms")],
)  # fmt: skip
def test_budgets_as_they_are_written(text, amount, unit):
    found = read_budget(text)
    assert found is not None
    assert (found.amount, found.unit) == (pytest.approx(amount), unit)


@pytest.mark.parametrize("text", ["60XB", "MB", "-3MB", "0ms", "3 apples", "140%", "1.2.3MB"])
def test_unknown_budgets_are_refused_with_the_known_units(text):
    with pytest.raises(PumiceError, match=r"budget="):
        Axes.make("wanda", allocation={"name": "dp", "budget": text})


def test_budget_and_density_are_one_thing():
    assert read_budget(" ") is None
    assert Axes.make("wanda", allocation={"name": "dp", "budget": "40%"}).density == 0.4
    assert Axes.make("wanda", allocation={"name": "dp", "budget": "9MB"}).density == 1.0
    with pytest.raises(PumiceError, match="contradict"):
        Axes.make("wanda", allocation={"name": "dp", "budget": "9MB"}, density=0.5)
    with pytest.raises(PumiceError, match="needs a density"):
        Axes.make("wanda", allocation="dp")
    with pytest.raises(PumiceError, match="N:M pattern fixes"):
        Axes.make("wanda", allocation={"name": "dp", "budget": "9MB"}, pattern="2:4")


@pytest.mark.parametrize("options", [{"errors": "guess"}, {"sensitivity": "fischer"}])
def test_unknown_choices_are_refused_at_once(options):
    with pytest.raises(PumiceError, match=next(iter(options))):
        Axes.make("wanda", allocation={"name": "dp", **options}, density=0.5)


def test_layers_without_tokens_keep_the_plain_density():
    from tests.methods.test_allocations import Half

    axes = Axes.make("wanda", allocation={"name": "dp", "sensitivity": "none"}, density=0.5)
    result = Pruner(Half(), axes, [correlated()], progress=False).run()
    by_name = {layer.name: layer for layer in result.layers}
    assert by_name["spare.weight"].asked == pytest.approx(0.5, abs=0.01)
    assert by_name["used.weight"].asked == pytest.approx(0.5, abs=0.01)


def test_the_dry_run_knows_the_budget_and_what_it_costs_to_share_it():
    from pumice.engine.prune import plan_prune

    model = tiny.llama()
    plan = plan_prune(model, "wanda", allocation={"name": "dp", "budget": "20kB"})
    assert plan.disk_bytes == 20_000
    assert any("budget of 20kB" in note for note in plan.notes)
    seconds = [
        plan_prune(model, "wanda", allocation={"name": "dp", "batches": count}, density=0.5, samples=1).seconds
        for count in (1, 10_000)
    ]
    assert seconds[1] > 10 * seconds[0]
