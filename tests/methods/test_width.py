"""Magnitude width pruning: what is smallest goes, and the count of parameters is exact."""

import pytest
import torch

from pumice.engine.shrink import shrink_result
from pumice.prune.shrink.base import block_parameters
from pumice.prune.shrink.width import magnitude
from pumice.prune.trace import trace
from tests import tiny

IDS = {"input_ids": torch.arange(4, 12)[None]}


def test_the_smallest_channels_go():
    model = tiny.llama()
    mlp = model.model.layers[0].mlp
    small = torch.arange(0, 48, 3)
    with torch.no_grad():
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight[small] *= 1e-3
        mlp.down_proj.weight[:, small] *= 1e-3
    kept = [c for c in range(48) if c % 3]
    expected = mlp.up_proj.weight.detach()[kept].clone()
    before = block_parameters(model)
    result = shrink_result(model, {"name": "width", "multiple": 8}, density=1 - 2 * 16 * 96 / before)
    assert torch.equal(mlp.up_proj.weight, expected)
    assert result.parameters["blocks"] == before - 2 * 16 * 96
    assert result.ordinary


def test_the_score_is_the_root_mean_square_of_makers_and_readers():
    model = tiny.llama()
    group = next(g for g in trace(model, IDS) if g.kind == "channel" and g.block)
    mlp = model.model.layers[0].mlp
    weights = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.t()], 1)
    torch.testing.assert_close(magnitude(model, group), weights.detach().square().mean(1).sqrt())


@pytest.mark.parametrize("density", [0.4, 0.7, 0.95])
@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
@pytest.mark.parametrize("heads", [False, True])
def test_the_density_is_never_exceeded_and_nearly_reached(density, allocation, heads):
    model = tiny.llama(num_key_value_heads=4, intermediate_size=96)
    options = {"heads": heads, "allocation": allocation, "multiple": 1}
    result = shrink_result(model, {"name": "width", **options}, density=density)
    assert density - 0.06 < result.density <= density + 1e-9
    assert torch.isfinite(model(**IDS).logits).all()
