"""Structured methods for language models through the public functions: shrunk, saved, loaded, the same model."""

import copy

import pytest
import torch

import pumice
from pumice.core.errors import PumiceError
from pumice.engine.shrink import save_shrunk, shrink_result
from tests import tiny
from tests.methods.test_depth import TOKENS, qwen3, same_with_cache
from tests.methods.test_slicegpt import gpt2, logits

METHODS = [
    {"name": "depth"},
    {"name": "depth", "by": "loss"},
    {"name": "slicegpt"},
    {"name": "slicegpt", "rotations": "one"},
    {"name": "2ssp", "alpha": 3.0, "refit": "dense"},
    {"name": "2ssp", "refit": "layer", "choice": "obs"},
    {"name": "cfsp"},
]


def label(method):
    return " ".join(str(value) for value in method.values())


@pytest.mark.parametrize("method", METHODS, ids=label)
@pytest.mark.parametrize(
    "make", [lambda: tiny.llama(num_hidden_layers=4, tie_word_embeddings=True), lambda: qwen3(4), gpt2]
)
def test_saved_and_loaded_it_is_the_same_model(make, method, tmp_path):
    from transformers import AutoModelForCausalLM

    result = shrink_result(make(), method, density=0.7, data=TOKENS, compute="float32", progress=False)
    assert 0.4 < result.density <= 0.705
    path = save_shrunk(result, tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(path).eval()
    torch.testing.assert_close(logits(again), logits(result.model), rtol=1e-3, atol=1e-3)
    assert same_with_cache(again)


def test_what_a_config_can_say_is_an_ordinary_checkpoint():
    for method, ordinary in (
        ({"name": "depth"}, True),
        ({"name": "slicegpt", "rotations": "one"}, True),
        ({"name": "slicegpt"}, False),
        ({"name": "2ssp", "alpha": 0.1}, True),
        ({"name": "2ssp", "alpha": 3.0}, False),
    ):
        result = shrink_result(tiny.llama(num_hidden_layers=4), method, density=0.75, data=TOKENS, progress=False)
        assert result.ordinary is ordinary, method


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_half_precision_models_keep_their_type(method):
    model = tiny.llama(num_hidden_layers=4).to(torch.bfloat16)
    before = logits(model).float()
    result = shrink_result(copy.deepcopy(model), method, density=0.75, data=TOKENS, progress=False)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    after = logits(result.model).float()
    assert torch.isfinite(after).all()
    assert float((after - before).norm()) < 3 * float(before.norm())


def test_depth_after_other_widths_is_refused():
    model = tiny.llama(num_hidden_layers=4)
    small = pumice.shrink(model, {"name": "cfsp", "a": 20.0, "multiple": 1}, density=0.8, data=TOKENS, progress=False)
    with pytest.raises(PumiceError, match="remove blocks first"):
        pumice.shrink(small, "depth", density=0.8, data=TOKENS, progress=False)
