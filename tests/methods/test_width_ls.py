"""Width pruning with least squares: the refit is optimal, and the greedy order is the brain surgeon's."""

import itertools

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.core.linalg import damped, damped_cholesky
from pumice.engine.shrink import shrink_result
from pumice.prune.shrink.measured import refit_kept
from pumice.prune.shrink.width_ls import greedy
from tests import tiny

IDS = torch.randint(4, 100, (8, 32), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS}]


def problem(inputs=8, outputs=5, rows=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator)
    x_TI = torch.randn(rows, inputs, generator=generator) @ mix
    return x_TI, torch.randn(outputs, inputs, generator=generator)


def loss_of_best(x_TI, w_OI, kept):
    """Least squares by the library: the smallest ‖X W − X_K W'‖² there is."""
    target = (x_TI @ w_OI.t()).double()
    solution = torch.linalg.lstsq(x_TI[:, kept].double(), target).solution
    return float((x_TI[:, kept].double() @ solution - target).square().sum())


def test_the_refit_is_the_least_squares_solution():
    x_TI, w_OI = problem()
    hessian = x_TI.t() @ x_TI / len(x_TI)
    kept = torch.tensor([0, 2, 3, 6])
    lower, _ = damped_cholesky(hessian[kept][:, kept], 0.0)
    found = refit_kept(w_OI, hessian, kept, lower)
    expected = torch.linalg.lstsq(x_TI[:, kept], x_TI @ w_OI.t()).solution.t()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("width", [1, 2])
def test_each_greedy_step_is_the_best_one_by_brute_force(width):
    x_TI, w_OI = problem(8)
    hessian = x_TI.t() @ x_TI / len(x_TI)
    columns = torch.arange(8).view(-1, width)
    units = len(columns)
    alive = list(range(units))
    for keep in range(units - 1, 0, -1):
        losses = {}
        for unit in alive:
            rest = [other for other in alive if other != unit]
            losses[unit] = loss_of_best(x_TI, w_OI, columns[rest].flatten())
        alive.remove(min(losses, key=losses.__getitem__))
        mask = greedy(w_OI, hessian, columns, keep, 0.0)
        assert torch.nonzero(mask).flatten().tolist() == alive


def test_greedy_is_near_the_best_subset():
    x_TI, w_OI = problem(8, seed=3)
    hessian = x_TI.t() @ x_TI / len(x_TI)
    mask = greedy(w_OI, hessian, torch.arange(8)[:, None], 4, 0.0)
    best = min(loss_of_best(x_TI, w_OI, torch.tensor(some)) for some in itertools.combinations(range(8), 4))
    assert loss_of_best(x_TI, w_OI, torch.nonzero(mask).flatten()) <= 1.5 * best


def test_a_channel_that_another_one_doubles_goes_without_loss():
    model = tiny.llama()
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        for layer in model.model.layers:
            for twin in range(16):
                for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
                    weight[twin + 16] = weight[twin]
        before = model(IDS).logits
    total = sum(p.numel() for p in model.model.layers.parameters())
    options = {"multiple": 1, "damp": 1e-6}
    shrink_result(model, {"name": "width-ls", **options}, density=1 - 2 * 16 * 96 / total, data=BATCHES)
    assert mlp.down_proj.in_features == 32
    with torch.no_grad():
        error = (model(IDS).logits - before).norm() / before.norm()
    assert float(error) < 2e-3


@pytest.mark.parametrize("choice", ["obs", "contribution", "activation"])
def test_every_choice_beats_no_compensation(choice):
    def error(method):
        model = tiny.llama(intermediate_size=96)
        with torch.no_grad():
            before = model(IDS).logits
            shrink_result(model, method, density=0.75, data=BATCHES)
            return float((model(IDS).logits - before).norm())

    assert error({"name": "width-ls", "choice": choice}) < error("width")


def test_an_unknown_choice_is_refused():
    with pytest.raises(PumiceError, match="obs, contribution, activation"):
        shrink_result(tiny.llama(), {"name": "width-ls", "choice": "best"}, density=0.8, data=BATCHES)


def test_damping_keeps_dead_inputs_harmless():
    x_TI, w_OI = problem()
    x_TI[:, 3] = 0
    hessian = damped(x_TI.t() @ x_TI / len(x_TI), 0.01)
    mask = greedy(w_OI, x_TI.t() @ x_TI / len(x_TI), torch.arange(8)[:, None], 7, 0.01)
    assert torch.isfinite(hessian).all()
    assert not mask[3]


def test_some_of_it_goes_as_whole_blocks():
    model = tiny.llama(num_hidden_layers=4)
    total = sum(p.numel() for p in model.model.layers.parameters())
    method = {"name": "width-ls", "blocks": 0.5, "multiple": 1}
    result = shrink_result(model, method, density=0.5, data=BATCHES)
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    assert result.ordinary
    assert sum(p.numel() for p in model.model.layers.parameters()) == pytest.approx(0.5 * total, rel=0.02)


def test_a_share_of_blocks_of_one_is_refused():
    with pytest.raises(PumiceError, match="blocks=1 "):
        shrink_result(tiny.llama(), {"name": "width-ls", "blocks": 1}, density=0.8, data=BATCHES)
