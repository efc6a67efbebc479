"""SliceGPT: nothing changes where nothing is sliced, the smallest components go, and the rest is as PCA says."""

import copy

import pytest
import torch

from pumice.core import registry, structure
from pumice.core.errors import PumiceError
from pumice.prune.shrink.base import Job
from pumice.prune.shrink.blocks import find_blocks, size
from pumice.prune.shrink.residual import find_residual, fold
from tests import tiny
from tests.methods.test_depth import BATCHES, TOKENS, qwen3, same_with_cache


def noisy(model):
    """Norms with scales and shifts, so that folding has something to do."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def llama(**changes):
    return noisy(tiny.llama(tie_word_embeddings=True, **changes))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    return noisy(GPT2LMHeadModel(config)).eval()


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    return noisy(OPTForCausalLM(OPTConfig(vocab_size=100, max_position_embeddings=64, init_std=0.2, **sizes))).eval()


MODELS = {"llama": llama, "qwen3": lambda: noisy(qwen3(2, tie_word_embeddings=True)), "gpt2": gpt2, "opt": opt}


def slicegpt(model, density=0.8, batches=BATCHES, **options):
    job = Job(density, batches=batches, progress=False)
    return registry.shrink.bind({"name": "slicegpt", **options})(model, job), job


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("rotations", ["each", "one"])
@pytest.mark.parametrize("name", MODELS)
def test_unsliced_it_computes_the_same(name, rotations):
    model = MODELS[name]()
    before = logits(model)
    rotated, _ = slicegpt(model, width=32, rotations=rotations)
    torch.testing.assert_close(logits(rotated), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert same_with_cache(rotated)


@pytest.mark.parametrize("rotations", ["each", "one"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_error_falls_with_the_kept_width(name, rotations):
    dense = MODELS[name]()
    before = logits(dense)
    errors = []
    for width in (8, 16, 24, 32):
        small, _ = slicegpt(copy.deepcopy(dense), width=width, rotations=rotations)
        errors.append(float((logits(small) - before).square().mean()))
        assert find_blocks(small)[1] is not None
    assert errors[3] < 1e-6 < errors[2] < errors[0]


def test_a_stream_that_lives_in_few_directions_is_sliced_without_loss():
    """Embeddings and all that writes the stream reach 16 directions only: 16 are enough, and 8 are not."""
    model = llama()
    basis = torch.linalg.qr(torch.randn(32, 16, generator=torch.Generator().manual_seed(2))).Q
    projection = basis @ basis.t()
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ projection)
        for layer in model.model.layers:
            # With equal gains the norms do not turn the stream out of its directions.
            layer.input_layernorm.weight.fill_(1.3)
            layer.post_attention_layernorm.weight.fill_(0.7)
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.weight.copy_(projection @ module.weight)
    before = logits(model)
    scale = float(before.abs().max())
    exact, _ = slicegpt(copy.deepcopy(model), width=16)
    torch.testing.assert_close(logits(exact), before, rtol=1e-3, atol=1e-4 * scale)
    less, _ = slicegpt(model, width=8)
    assert float((logits(less) - before).abs().max()) > 0.01 * scale


def test_folding_leaves_plain_norms_and_a_centred_stream():
    model = gpt2()
    before = logits(model)
    residual = find_residual(model, BATCHES[0])
    with torch.no_grad():
        fold(residual, model, head=True)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    for branch in [*residual.branches, residual.final]:
        assert torch.equal(branch.norm.weight, torch.ones(32))
        assert not branch.norm.bias.any()
    seen = []
    handle = model.transformer.ln_f.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    handle.remove()
    assert float(seen[0].mean(-1).abs().max()) < 1e-5 * float(seen[0].abs().max())


@pytest.mark.parametrize("rotations", ["each", "one"])
def test_the_density_is_met_with_the_shortcuts_counted(rotations):
    model = llama(hidden_size=64, intermediate_size=192, head_dim=16)
    before = size(find_blocks(model)[1])
    small, job = slicegpt(model, 0.8, rotations=rotations)
    after = size(find_blocks(small)[1])
    assert 0.6 * before < after <= 0.8 * before
    kept = small.model.embed_tokens.weight.shape[1]
    assert kept % 8 == 0
    assert f"{kept} of 64 directions" in job.notes[0]
    assert small.config.tie_word_embeddings is False
    assert small.lm_head.weight is not small.model.embed_tokens.weight


def test_one_rotation_leaves_an_ordinary_llama(tmp_path):
    from transformers import AutoModelForCausalLM

    small, _ = slicegpt(llama(), width=24, rotations="one")
    assert small.config.hidden_size == 24
    assert structure.describe(small) is None
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(small), rtol=1e-3, atol=1e-3)


def test_the_width_is_one_that_the_config_can_state(tmp_path):
    from transformers import AutoModelForCausalLM

    # Three heads: Transformers refuses hidden sizes that are no multiple of 3, and 40 of 48 is none.
    model = llama(hidden_size=48, num_attention_heads=3, num_key_value_heads=3, head_dim=16)
    small, _ = slicegpt(model, density=0.87, rotations="one")
    assert small.config.hidden_size % 3 == 0
    assert structure.describe(small) is None
    small.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(small), rtol=1e-3, atol=1e-3
    )
    odd, _ = slicegpt(
        llama(hidden_size=48, num_attention_heads=3, num_key_value_heads=3, head_dim=16), width=40, rotations="one"
    )
    assert structure.describe(odd) is not None
    assert odd.config.hidden_size == 48


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("rotations", ["each", "one"])
def test_the_noted_structure_rebuilds_it(name, rotations):
    small, _ = slicegpt(MODELS[name](), width=16, rotations=rotations)
    described = structure.describe(small)
    fresh = type(small)(copy.deepcopy(small.config)).eval()
    if described is not None:
        structure.rebuild(fresh, described)
    fresh.load_state_dict(small.state_dict())
    torch.testing.assert_close(logits(fresh), logits(small), rtol=1e-3, atol=1e-3)


def test_bad_input():
    with pytest.raises(PumiceError, match=r"rotations='many'.*each or one"):
        slicegpt(llama(), rotations="many")
    with pytest.raises(PumiceError, match=r"width=40.*\[8, 32\]"):
        slicegpt(llama(), width=40)
    with pytest.raises(PumiceError, match="data=None"):
        slicegpt(llama(), batches=[])
    with pytest.raises(PumiceError, match=r"density=0\.01"):
        slicegpt(llama(), 0.01)
    with pytest.raises(PumiceError, match="norm, attention, norm, FFN"):
        slicegpt(tiny.bert())
    with pytest.raises(PumiceError, match="norm, attention, norm, FFN"):
        slicegpt(tiny.gemma2())
    model = llama()
    before = logits(model)
    same, _ = slicegpt(model, 1.0)
    assert torch.equal(logits(same), before)
