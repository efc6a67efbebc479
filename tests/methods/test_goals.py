"""The goal "dense": its weights are the least-squares answer, and pruned blocks make up for what was lost before them."""

import copy

import pytest
import torch
from torch import nn

import pumice
from pumice.core import registry
from pumice.core.stream import Stream
from pumice.core.view import find_views
from tests import tiny
from tests.methods.layers import correlated, draw

TOKENS = torch.randint(4, 100, (6, 24), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": TOKENS[:3]}, {"input_ids": TOKENS[3:]}]


def goal(w, now, before, **options):
    stats = {"hessian": now.t() @ now / len(now), "drift": (before - now).t() @ now / len(now)}
    return registry.goal.get("dense").bind(options)(w, stats)


def test_it_is_the_least_squares_answer():
    before = correlated(tokens=300, width=12)
    now = before + 0.3 * draw(300, 12, seed=5) @ draw(12, 12, seed=6)
    w = draw(7, 12)
    best = torch.linalg.lstsq(now.double(), before.double() @ w.double().t()).solution.t()
    torch.testing.assert_close(goal(w, now, before, damp=0.0).double(), best, rtol=1e-3, atol=1e-3)
    halfway = goal(w, now, before, damp=0.0, share=0.5).double()
    torch.testing.assert_close(halfway, (w.double() + best) / 2, rtol=1e-3, atol=1e-3)


def test_without_drift_it_is_the_layer_itself():
    x, w = correlated(width=12), draw(7, 12)
    torch.testing.assert_close(goal(w, x, x), w)


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24))


def test_the_drift_pairs_each_row_with_the_dense_one():
    """Three linear layers, the first one changed by the visit: what the others read is known by hand."""
    model, dense = blocks(), blocks()
    x = [draw(10, 24, seed=1), draw(14, 24, seed=2)]
    found = {}

    def visit(unit, collect):
        found.update(collect(frozenset({"hessian", "drift"})))
        unit.module.weight.data.mul_(0.5)

    Stream(model, find_views(model), x, dense=True).walk(visit)
    whole = torch.cat(x)
    now, before = whole, whole
    for index in range(3):
        got = found[f"{index}.weight"]
        torch.testing.assert_close(got["hessian"][0], now.t() @ now / 24, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got["drift"][0], (before - now).t() @ now / 24, rtol=1e-4, atol=1e-5)
        now, before = model[index](now).detach(), dense[index](before).detach()


def test_layers_of_a_block_one_after_the_other():
    """A block of two layers in a row: the second one is calibrated on what the pruned first one gives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), nn.Linear(8, 4))
    dense = copy.deepcopy(model)
    x = draw(40, 16)
    found = {}

    def visit(unit, collect):
        for views in collect.steps():
            found.update(collect(frozenset({"hessian", "drift"}), views))
            for view in views:
                view.write(view.read() * 0.5)

    Stream(model, find_views(model), [x], dense=True).walk(visit)
    assert list(found) == ["0.0.weight", "0.1.weight", "1.weight"]
    now, before = [x], [x]
    for layer, old in zip([*model[0], model[1]], [*dense[0], dense[1]], strict=True):
        now.append(layer(now[-1]).detach())
        before.append(old(before[-1]).detach())
    for index, got in enumerate(found.values()):
        torch.testing.assert_close(got["hessian"][0], now[index].t() @ now[index] / 40, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            got["drift"][0], (before[index] - now[index]).t() @ now[index] / 40, rtol=1e-4, atol=1e-5
        )


def test_steps_of_a_llama_block():
    model = tiny.llama()
    steps = []
    Stream(model, find_views(model), BATCHES).walk(lambda unit, collect: steps.append(collect.steps()))
    names = [[view.module_name.rpartition(".")[2] for view in views] for views in steps[0]]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("make", [tiny.llama, tiny.t5], ids=["one stack", "two stacks"])
def test_the_whole_model_comes_nearer_to_dense(make):
    def error(**axes):
        torch.manual_seed(0)
        dense, model = make(), make()
        model.load_state_dict(dense.state_dict())
        inputs = dict(BATCHES[0]) | ({"decoder_input_ids": TOKENS[:3]} if make is tiny.t5 else {})
        batches = [{**inputs, "input_ids": batch["input_ids"]} for batch in BATCHES]
        pumice.prune(model, "sparsegpt", density=0.4, **axes, data=batches, progress=False)
        with torch.no_grad():
            return sum(float((model(**b).logits - dense(**b).logits).square().sum()) for b in batches)

    plain = error()
    assert error(goal="dense") < plain
    assert error(goal="dense", sequential=True) < plain
    assert error(sequential=True) != plain
