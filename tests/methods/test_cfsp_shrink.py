"""CFSP: shares by the angles of the blocks, channels by the formula, widths in multiples."""

import math

import pytest
import torch

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.prune.shrink.base import Job
from pumice.prune.shrink.blocks import find_blocks, similarities, size
from pumice.prune.shrink.cfsp import _Exponents, channel_scores, granule, keep_ratios
from pumice.prune.shrink.ffn import activation_norms
from tests import tiny
from tests.methods.test_depth import BATCHES, QUIET, qwen3, same_with_cache
from tests.methods.test_slicegpt import gpt2, logits, opt
from tests.methods.test_two_ssp import groups_of


def cfsp(model, density=0.7, batches=BATCHES, **options):
    job = Job(density, batches=batches, progress=False)
    return registry.shrink.bind({"name": "cfsp", **options})(model, job), job


def test_scores_are_the_formula_channel_by_channel():
    model = tiny.llama()
    groups, layers, _ = groups_of(model)
    norms = activation_norms(model, groups, BATCHES, QUIET)
    for group, block in zip(groups, layers, strict=True):
        found = channel_scores(model, group, norms[group.name], _Exponents(1.5, 0.5))
        x = norms[group.name] / norms[group.name].mean()
        up, gate, down = (
            block.mlp.up_proj.weight.abs(),
            block.mlp.gate_proj.weight.abs(),
            block.mlp.down_proj.weight.abs(),
        )
        for channel in range(48):
            row_up = (up[channel] / up.sum(0)).mean()
            row_gate = (gate[channel] / gate.sum(0)).mean()
            reached = down * x**1.5
            row_down = (reached[:, channel] / reached.sum(1)).mean()
            expected = (row_down + row_up + row_gate) * x[channel] ** 0.5
            assert float(found[channel]) == pytest.approx(expected.item(), rel=1e-4)


def test_shares_follow_the_sigmoid_of_the_angles():
    ratios = keep_ratios([0.1, 0.2, 0.6], 5.0)
    assert ratios == pytest.approx([1 / (1 + math.exp(1.0)), 1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-1.5))])
    assert keep_ratios([0.1, 0.2, 0.6], 0.0) == [0.5, 0.5, 0.5]
    model = tiny.llama(num_hidden_layers=4, intermediate_size=480)
    angles = similarities(model, model.model.layers, BATCHES, lambda cosine: cosine.acos() / math.pi, QUIET)
    small, _ = cfsp(model, 0.7, a=3.0, multiple=1)
    widths = [block.mlp.down_proj.weight.shape[1] for block in small.model.layers]
    wanted = keep_ratios(angles, 3.0)
    assert len(set(widths)) > 1
    for width, ratio in zip(widths, wanted, strict=True):
        assert width / sum(widths) == pytest.approx(ratio / sum(wanted), abs=0.01)


def test_more_a_spreads_more_and_none_is_uniform():
    spreads = []
    for a in (0.0, 2.0, 6.0):
        small, _ = cfsp(tiny.llama(num_hidden_layers=4, intermediate_size=480), 0.7, a=a, multiple=1)
        widths = [block.mlp.down_proj.weight.shape[1] for block in small.model.layers]
        spreads.append(max(widths) - min(widths))
    assert spreads[0] == 0 < spreads[1] < spreads[2]


@pytest.mark.parametrize("refit", ["none", "layer", "dense"])
@pytest.mark.parametrize("make", [lambda: tiny.llama(num_hidden_layers=3), qwen3, gpt2, opt])
def test_parameters_really_go(make, refit):
    model = make()
    before = size(find_blocks(model)[1])
    small, job = cfsp(model, 0.8, refit=refit, multiple=1)
    assert 0.77 * before < size(find_blocks(small)[1]) <= 0.8005 * before
    assert torch.isfinite(logits(small)).all()
    assert same_with_cache(small)
    assert any("channels per FFN" in note for note in job.notes)


@pytest.mark.parametrize(
    ("width", "step"), [(1, 1), (48, 1), (64, 1), (768, 16), (1536, 32), (8192, 128), (28672, 128)]
)
def test_widths_come_in_multiples(width, step):
    assert granule(width) == step


def test_widths_are_rounded_to_the_multiple():
    small, _ = cfsp(tiny.llama(num_hidden_layers=3, intermediate_size=256), 0.7, multiple=32)
    assert all(block.mlp.down_proj.weight.shape[1] % 32 == 0 for block in small.model.layers)


def test_bad_input():
    with pytest.raises(PumiceError, match="refit='all'"):
        cfsp(tiny.llama(), refit="all")
    with pytest.raises(PumiceError, match="data=None"):
        cfsp(tiny.llama(), batches=[])
    with pytest.raises(PumiceError, match=r"density=0\.05"):
        cfsp(tiny.llama(), 0.05)
