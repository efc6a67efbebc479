"""Depth pruning: the right blocks go, the rest computes as before, config and KV cache know of it."""

import copy
import itertools

import pytest
import torch
from torch import nn

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.core.gradients import loss_of
from pumice.prune.shrink.base import Job
from pumice.prune.shrink.blocks import find_blocks, similarities
from pumice.prune.shrink.depth import keep_blocks
from pumice.prune.shrink.trials import Trials
from tests import tiny

TOKENS = torch.randint(4, 100, (4, 24), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": TOKENS[:2]}, {"input_ids": TOKENS[2:]}]


QUIET = Job(1.0, progress=False)


def qwen3(layers=5, **changes):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = tiny._TEXT | {
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**(sizes | changes))).eval()


def depth(model, density, batches=BATCHES, **options):
    job = Job(density, batches=batches, progress=False)
    return registry.shrink.bind({"name": "depth", **options})(model, job), job


def same_with_cache(model, tokens=TOKENS[:1, :6]):
    """Greedy generation gives the same tokens with and without a KV cache."""
    with torch.no_grad():
        ids = [
            model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=8,
                do_sample=False,
                use_cache=use,
                pad_token_id=0,
            )
            for use in (True, False)
        ]
    return torch.equal(*ids)


def total_loss(model):
    with torch.no_grad():
        return sum(float(loss_of(model, batch, None)) for batch in BATCHES)


def without(model, gone):
    """The model with an identity in place of some blocks, all else as it was."""

    class Skip(nn.Module):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states

    other = copy.deepcopy(model)
    _, layers = find_blocks(other)
    for index in gone:
        layers[index] = Skip()
    return other


@pytest.mark.parametrize("make", [lambda: tiny.llama(num_hidden_layers=5), qwen3])
def test_blocks_of_least_influence_go_and_the_rest_computes_as_before(make):
    model = make()
    inputs, outputs = [], []
    _, layers = find_blocks(model)
    with torch.no_grad():
        for batch in BATCHES:
            states = model(**batch, output_hidden_states=True).hidden_states
            inputs.append(torch.stack(states[:-1]))
            # The last state that the model reports is behind the final norm.
            taken = []
            handle = layers[-1].register_forward_hook(lambda module, args, output, taken=taken: taken.append(output))
            model(**batch)
            handle.remove()
            outputs.append(torch.stack([*states[1:-1], *taken]))
    x, y = torch.cat(inputs, 1), torch.cat(outputs, 1)
    influence = 1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    expected = influence.mean((1, 2))
    found = similarities(model, layers, BATCHES, lambda cosine: 1 - cosine, QUIET)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)
    gone = sorted(expected.argsort()[:2].tolist())
    reference = without(model, gone)
    small, job = depth(model, 0.6)
    assert small.config.num_hidden_layers == len(small.model.layers) == 3
    with torch.no_grad():
        torch.testing.assert_close(small(TOKENS).logits, reference(TOKENS).logits)
    assert same_with_cache(small)
    assert "2 of 5 blocks removed" in job.notes[0]


def test_the_result_is_an_ordinary_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM

    mixed = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = qwen3(layer_types=mixed, use_sliding_window=True, sliding_window=4)
    keep_blocks(model, "model.layers", model.model.layers, [1, 2, 4])
    assert model.config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1, 2]
    assert same_with_cache(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)


def test_greedy_takes_the_best_block_of_each_step():
    model = tiny.llama(num_hidden_layers=4)

    def loss(gone):
        return total_loss(without(model, gone))

    first = min(range(4), key=lambda index: loss([index]))
    second = min((i for i in range(4) if i != first), key=lambda index: loss([first, index]))
    reference = without(model, [first, second])
    small, _ = depth(model, 0.5, by="loss")
    with torch.no_grad():
        torch.testing.assert_close(small(TOKENS).logits, reference(TOKENS).logits)


def test_trials_from_the_middle_equal_whole_passes():
    model = tiny.llama(num_hidden_layers=4)
    trials = Trials(model, model.model.layers, BATCHES)
    for index in range(4):
        assert trials.loss(index) == pytest.approx(total_loss(without(model, [index])) / 2, rel=1e-5)
    before = list(model.model.layers)
    assert trials.loss() == pytest.approx(total_loss(model) / 2, rel=1e-5)
    assert list(model.model.layers) == before


def test_greedy_by_loss_is_no_worse_than_by_influence_where_one_block_goes():
    """One step of the greedy search looks at every possibility."""
    results = {}
    for by in ("influence", "loss"):
        small, _ = depth(tiny.llama(num_hidden_layers=5, seed=3), 0.8, by=by)
        results[by] = total_loss(small)
    assert results["loss"] <= results["influence"] + 1e-6


@pytest.mark.parametrize("density", [1.0, 0.75, 0.5, 0.25])
def test_at_most_the_density_is_left(density):
    model = tiny.llama(num_hidden_layers=4)
    before = sum(p.numel() for p in model.model.layers.parameters())
    small, _ = depth(model, density)
    after = sum(p.numel() for p in small.model.layers.parameters())
    assert after <= density * before
    assert after > (density - 0.25) * before


def test_padding_does_not_count():
    model = tiny.llama(num_hidden_layers=3)
    short = TOKENS[:2, :10]
    padded = torch.cat([short, torch.zeros(2, 7, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    _, layers = find_blocks(model)
    a, b = (
        similarities(model, layers, [batch], torch.acos, QUIET)
        for batch in ({"input_ids": short}, {"input_ids": padded, "attention_mask": mask})
    )
    assert a == pytest.approx(b, rel=1e-4)


def test_encoders_and_gpt2_too():
    from transformers import GPT2Config, GPT2LMHeadModel

    bert = tiny.bert(num_hidden_layers=3)
    small, _ = depth(bert, 0.67)
    assert small.config.num_hidden_layers == len(small.encoder.layer) == 2
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=4, n_head=4, n_positions=64)).eval()
    small, _ = depth(gpt2, 0.5)
    assert small.config.n_layer == len(small.transformer.h) == 2
    assert same_with_cache(small)


def test_bad_input():
    with pytest.raises(PumiceError, match=r"by='luck'.*influence or loss"):
        depth(tiny.llama(), 0.5, by="luck")
    with pytest.raises(PumiceError, match="data=None"):
        depth(tiny.llama(), 0.5, batches=[])
    with pytest.raises(PumiceError, match="no list of blocks"):
        depth(nn.Sequential(nn.Linear(2, 2)), 0.5)
    with pytest.raises(PumiceError, match="one stack of blocks"):
        depth(tiny.t5(), 0.5)
    from transformers import GPT2Config, GPT2LMHeadModel

    numbered = GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(PumiceError, match="scale_attn_by_inverse_layer_idx=True"):
        depth(GPT2LMHeadModel(numbered), 0.5)


def test_every_set_of_kept_blocks_keeps_its_order():
    for kept in itertools.combinations(range(4), 2):
        model = tiny.llama(num_hidden_layers=4)
        blocks = [model.model.layers[i] for i in kept]
        keep_blocks(model, "model.layers", model.model.layers, kept)
        assert list(model.model.layers) == blocks
