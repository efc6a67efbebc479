"""Removing heads: the importance is the output that a head makes, and a head that another repeats goes first."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.engine.shrink import shrink_result
from pumice.prune.shrink.base import Job, inner_groups
from pumice.prune.shrink.heads import contribution
from pumice.prune.shrink.measured import measure
from tests import tiny

IDS = torch.randint(4, 100, (8, 32), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS}]


def less(heads, layers=2):
    """Density at which every layer of the tiny Llama with 4 KV groups loses so many."""
    model = tiny.llama(num_key_value_heads=4)
    total = sum(p.numel() for p in model.model.layers.parameters())
    return 1 - heads * layers * 4 * 8 * 32 / total


def test_the_importance_is_the_mean_square_of_what_a_head_adds():
    model = tiny.llama(num_key_value_heads=2)
    job = Job(0.9, BATCHES, progress=False)
    groups = inner_groups(model, job, ("head",))
    reader = measure(model, groups, job, frozenset(("hessian",)), "heads")[groups[0].name][0]
    module, seen = model.model.layers[0].self_attn.o_proj, []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(IDS)
        handle.remove()
        for head in range(2):
            part = torch.zeros_like(seen[0])
            part[:, 16 * head : 16 * head + 16] = seen[0][:, 16 * head : 16 * head + 16]
            expected = module(part).square().sum(1).mean()
            torch.testing.assert_close(contribution(reader)[head], expected, atol=1e-5, rtol=1e-3)


def test_repeated_heads_go_and_their_twins_take_over():
    model = tiny.llama(num_key_value_heads=4)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight[16:32] = projection.weight[0:16]
        before = model(IDS).logits
    result = shrink_result(model, {"name": "heads", "damp": 1e-6}, density=less(2), data=BATCHES)
    assert result.ordinary
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (2, 2, 8)
    with torch.no_grad():
        error = (model(IDS).logits - before).norm() / before.norm()
    assert float(error) < 2e-3


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
@pytest.mark.parametrize("compensation", [False, True])
def test_heads_that_say_nothing_go_first(allocation, compensation):
    model = tiny.llama(num_key_value_heads=4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, 16:24] = 0
        before = model(IDS).logits
    options = {"allocation": allocation, "compensation": compensation}
    shrink_result(model, {"name": "heads", **options}, density=less(1), data=BATCHES)
    assert [layer.self_attn.q_proj.out_features for layer in model.model.layers] == [24, 24]
    torch.testing.assert_close(model(IDS).logits, before, atol=5e-2 if compensation else 1e-4, rtol=5e-2)


def test_more_than_the_heads_hold_is_refused():
    with pytest.raises(PumiceError, match="removing heads alone"):
        shrink_result(tiny.llama(), "heads", density=0.3, data=BATCHES)


def test_vision_and_gpt2_heads_go_too():
    model = tiny.vit()
    images = {"pixel_values": torch.randn(4, 3, 16, 16)}
    result = shrink_result(model, "heads", density=0.85, data=[images])
    assert result.density < 0.87
    assert not result.ordinary
    with torch.no_grad():
        assert torch.isfinite(model(**images)[0]).all()
