"""FLAP: the score's formula, and that the bias keeps every reader's mean output."""

import pytest
import torch

from pumice.core.stream import Stream
from pumice.core.view import find_views
from pumice.engine.shrink import shrink_result
from pumice.prune.shrink.base import Job, inner_groups
from pumice.prune.shrink.measured import measure
from tests import tiny

IDS = torch.randint(4, 100, (6, 24), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS}]


def inputs_of(model, name):
    """What a layer reads in the model as it is, [T, I]."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=IDS)
    handle.remove()
    return seen[0].flatten(0, 1)


def test_the_mean_output_of_a_reader_stays():
    model = tiny.llama()
    name = "model.layers.0.mlp.down_proj"
    module = model.get_submodule(name)
    before = module(inputs_of(model, name)).mean(0)
    result = shrink_result(
        model, {"name": "flap", "heads": False, "allocation": "uniform", "multiple": 1}, density=0.7, data=BATCHES
    )
    assert result.density < 0.75
    # Everything in front of the first block's MLP is as it was.
    torch.testing.assert_close(module(inputs_of(model, name)).mean(0), before, atol=1e-5, rtol=1e-4)


def test_what_never_fluctuates_goes_without_a_trace():
    model = tiny.bert()
    layer = model.encoder.layer[0]
    still = torch.arange(0, 48, 3)
    with torch.no_grad():
        layer.intermediate.dense.weight[still] = 0
        layer.intermediate.dense.bias[still] = torch.linspace(1, 2, len(still))
    with torch.no_grad():
        before = model(input_ids=IDS)[0]
    cost = 65 * len(still)
    total = sum(p.numel() for p in model.encoder.layer.parameters())
    shrink_result(
        model,
        {"name": "flap", "heads": False, "allocation": "uniform", "multiple": 1},
        density=1 - cost / total,
        data=BATCHES,
    )
    assert layer.intermediate.dense.out_features == 48 - len(still)
    torch.testing.assert_close(model(input_ids=IDS)[0], before, atol=1e-5, rtol=1e-4)


def test_the_score_is_variance_times_the_squared_norm_of_the_columns():
    from pumice.prune.shrink.flap import _score

    model = tiny.llama()
    groups = inner_groups(model, Job(0.5, BATCHES), ("channel", "head"))
    readers = measure(model, groups, Job(0.5, BATCHES, progress=False), frozenset(("input_mean", "input_var")), "flap")
    for name in ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"):
        x_TI, weight = inputs_of(model, name), model.get_submodule(name).weight.detach()
        expected = x_TI.var(0, correction=0) * weight.square().sum(0)
        reader = readers[name][0]
        expected = expected[reader.columns_Um].mean(1)
        torch.testing.assert_close(_score(reader, False), expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("build", [tiny.llama, tiny.vit, lambda: tiny.bert("BertForMaskedLM")])
def test_adaptive_widths_differ_and_the_model_runs(build):
    model = build()
    main = model.main_input_name
    data = [{"input_ids": IDS}] if main == "input_ids" else [{main: torch.randn(4, 3, 16, 16)}]
    result = shrink_result(model, {"name": "flap", "multiple": 1}, density=0.7, data=data)
    assert 0.55 < result.density < 0.76
    with torch.no_grad():
        assert torch.isfinite(model(**data[0])[0]).all()


def test_statistics_are_those_of_the_dense_model():
    """All is measured in one pass, so that removing in the first block does not change the second one's scores."""
    model = tiny.llama()
    job = Job(0.5, BATCHES, progress=False)
    groups = inner_groups(model, job, ("channel",))
    readers = measure(model, groups, job, frozenset(("input_mean",)), "flap")
    found = {}
    Stream(model, find_views(model), BATCHES).walk(
        lambda unit, collect: found.update(collect(frozenset({"input_mean"})))
    )
    for name, (reader,) in readers.items():
        torch.testing.assert_close(reader.stats["input_mean"], found[f"{name}.weight"]["input_mean"][0])
