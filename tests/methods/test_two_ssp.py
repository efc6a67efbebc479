"""2SSP: the formula, the scores, the greedy choice of attentions, and the refit as the least squares that it is."""

import copy
import itertools

import pytest
import torch

from pumice.core import registry, structure
from pumice.core.errors import PumiceError
from pumice.prune.shrink.base import Job
from pumice.prune.shrink.blocks import find_blocks, find_parts, size
from pumice.prune.shrink.ffn import activation_norms, ffn_groups
from pumice.prune.shrink.refit import cut, refitted
from pumice.prune.shrink.two_ssp import attentions_to_remove
from pumice.weights.residual import NoAttention
from tests import tiny
from tests.methods.test_depth import BATCHES, QUIET, TOKENS, qwen3, same_with_cache, total_loss
from tests.methods.test_slicegpt import gpt2, logits, opt


def two_ssp(model, density=0.7, batches=BATCHES, **options):
    job = Job(density, batches=batches, progress=False)
    return registry.shrink.bind({"name": "2ssp", "multiple": 1, **options})(model, job), job


def groups_of(model):
    name, layers = find_blocks(model)
    parts = find_parts(model, layers, BATCHES[0])
    return ffn_groups(model, Job(0.5, batches=BATCHES), name, parts), layers, parts


@pytest.mark.parametrize(("sparsity", "alpha"), [(0.25, 1.5), (0.5, 1.5), (0.5, 4.0), (0.375, 0.5)])
def test_number_of_attentions_is_the_papers_formula(sparsity, alpha):
    model = tiny.llama(num_hidden_layers=8, intermediate_size=80)
    # q, o: 32 x 32; k, v: 16 x 32; gate, up, down: 80 x 32.
    ratio = 3 * 80 * 32 / (2 * 32 * 32 + 2 * 16 * 32)
    _, layers, parts = groups_of(model)
    assert attentions_to_remove(layers, parts, sparsity, alpha) == round(8 * sparsity ** (ratio / alpha))


@pytest.mark.parametrize("make", [tiny.llama, gpt2, opt])
def test_scores_are_mean_norms_of_activations(make):
    model = make()
    groups, _, _ = groups_of(model)
    found = activation_norms(model, groups, BATCHES, QUIET)
    for group in groups:
        seen = []
        module = model.get_submodule(group.readers[0].module)
        handle = module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        for row in TOKENS:
            with torch.no_grad():
                model(row[None])
        handle.remove()
        expected = torch.stack([x.reshape(-1, x.shape[-1]).norm(dim=0) for x in seen]).mean(0)
        torch.testing.assert_close(found[group.name], expected, rtol=1e-4, atol=1e-5)


def test_the_weakest_neurons_and_the_least_missed_attentions_go():
    model = tiny.llama(num_hidden_layers=4)
    groups, _, _ = groups_of(model)
    scores = activation_norms(model, groups, BATCHES, QUIET)
    by_hand = copy.deepcopy(model)
    small, _ = two_ssp(copy.deepcopy(model), 0.7, alpha=3.0)
    kept = small.model.layers[0].mlp.down_proj.weight.shape[1]
    assert kept < 48
    with torch.no_grad():
        for group, block in zip(groups, by_hand.model.layers, strict=True):
            gone = scores[group.name].argsort()[: 48 - kept]
            block.mlp.down_proj.weight[:, gone] = 0
    missing = [i for i, block in enumerate(small.model.layers) if isinstance(block.self_attn, NoAttention)]
    assert missing

    def without(some):
        other = copy.deepcopy(by_hand)
        with torch.no_grad():
            for index in some:
                other.model.layers[index].self_attn.o_proj.weight.zero_()
        return other

    taken = []
    for _ in missing:
        taken.append(min((i for i in range(4) if i not in taken), key=lambda i: total_loss(without([*taken, i]))))
    assert sorted(taken) == missing
    torch.testing.assert_close(logits(small), logits(without(taken)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [lambda: tiny.llama(num_hidden_layers=4), lambda: qwen3(4), gpt2, opt])
def test_parameters_really_go_and_the_cache_counts_on(make):
    model = make()
    before = size(find_blocks(model)[1])
    small, job = two_ssp(model, 0.7, alpha=3.0)
    after = size(find_blocks(small)[1])
    assert 0.6 * before < after <= 0.702 * before
    assert "attentions removed: " in job.notes[0]
    assert same_with_cache(small)


@pytest.mark.parametrize("gone", [[0], [0, 1], [2], [0, 1, 2]])
def test_the_cache_counts_on_whichever_attention_is_gone(gone):
    mixed = ["sliding_attention", "full_attention", "full_attention"]
    model = qwen3(3, layer_types=mixed, use_sliding_window=True, sliding_window=4)
    for index in gone:
        structure.replace(model, f"model.layers.{index}.self_attn", NoAttention)
    assert same_with_cache(model)


def test_the_noted_structure_rebuilds_it():
    small, _ = two_ssp(tiny.llama(num_hidden_layers=4), 0.7, alpha=3.0)
    fresh = type(small)(copy.deepcopy(small.config)).eval()
    structure.rebuild(fresh, structure.describe(small))
    fresh.load_state_dict(small.state_dict())
    torch.testing.assert_close(logits(fresh), logits(small))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_refit_is_least_squares_and_beats_cutting():
    x = draw(200, 12) @ draw(12, 12, seed=1)
    drift = 0.3 * draw(200, 12, seed=2)
    w = draw(5, 12, seed=3)
    kept = torch.tensor([0, 2, 3, 7, 8, 11])
    hessian, goal = x.t() @ x / 200, (x + drift).t() @ x / 200
    wanted = (x + drift) @ w.t()
    best = torch.linalg.lstsq(x[:, kept], wanted).solution.t()
    found = refitted(w, hessian, goal, kept, damp=1e-9)
    torch.testing.assert_close(found.double(), best, rtol=1e-3, atol=1e-4)

    def off(v):
        return float((x[:, kept] @ v.double().t() - wanted).square().sum())

    assert off(best) <= off(refitted(w, hessian, goal, kept, damp=0.1)) < off(w[:, kept])


def test_refitted_blocks_come_nearer_to_the_dense_model():
    """Averaged over models: a fit to one block's outputs promises nothing for a single random model's logits."""
    errors = {"none": 0.0, "layer": 0.0, "dense": 0.0}
    for seed, refit in itertools.product(range(3), errors):
        model = tiny.llama(seed=seed)
        tokens = torch.randint(4, 100, (16, 40), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            before = model(tokens).logits
            groups, _, _ = groups_of(model)
            scores = activation_norms(model, groups, BATCHES, QUIET)
            cuts = [(g, scores[g.name] > scores[g.name].median()) for g in groups]
            cut(model, cuts, [{"input_ids": tokens}], Job(0.5, progress=False), refit)
            errors[refit] += float((model(tokens).logits - before).square().sum() / before.square().sum())
    assert errors["dense"] < errors["layer"] < errors["none"]


def test_refit_of_nothing_removed_changes_nothing():
    model = tiny.llama()
    before = logits(model)
    groups, _, _ = groups_of(model)
    cuts = [(group, torch.ones(group.units, dtype=torch.bool)) for group in groups]
    cut(model, cuts, BATCHES, Job(1.0, progress=False), "dense")
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)


def test_bad_input():
    with pytest.raises(PumiceError, match=r"refit='much'.*none, layer, dense"):
        two_ssp(tiny.llama(), refit="much")
    with pytest.raises(PumiceError, match="alpha=0"):
        two_ssp(tiny.llama(), alpha=0.0)
    with pytest.raises(PumiceError, match="data=None"):
        two_ssp(tiny.llama(), batches=[])
    with pytest.raises(PumiceError, match=r"density=0\.1"):
        two_ssp(tiny.llama(), 0.1, alpha=0.1)
    with pytest.raises(PumiceError, match="norm, attention, norm, FFN"):
        two_ssp(tiny.bert())
