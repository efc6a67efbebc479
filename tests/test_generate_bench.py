"""Generation and timing: what is counted, never how fast."""

import json
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from pumice.core.errors import PumiceError
from pumice.engine.bench import bench, model_bytes, rows_of
from pumice.engine.generate import generate
from tests import tiny

QUICK: dict[str, Any] = {"prompt_tokens": 8, "new_tokens": 3, "repeats": 2}


@pytest.fixture(autouse=True)
def stamp(monkeypatch):
    """A fixed machine stamp, so that these tests do not depend on the kernels being built."""
    module = types.ModuleType("pumice.kernels.features")
    module.machine_stamp = lambda: {"cpu": "test"}  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "pumice.kernels.features", module)


def greedy(model, ids, count):
    """Greedy continuation without a cache."""
    row = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(count):
            row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], dim=1)
    return row[0, len(ids) :].tolist()


def test_generate_is_greedy_and_counts():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    expected = greedy(model, tokenizer("w1 w2 w3")["input_ids"], 6)
    assert 2 not in expected
    out = generate(model, tokenizer, "w1 w2 w3", max_new_tokens=6)
    assert out.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert (out.prompt_tokens, out.new_tokens) == (3, 6)
    assert out.prefill_seconds > 0
    assert out.decode_seconds > 0
    assert out.tokens_per_second == pytest.approx(5 / out.decode_seconds)
    assert json.loads(json.dumps(out.to_dict()))["new_tokens"] == 6
    one = generate(model, tokenizer, "w1", max_new_tokens=1)
    assert one.new_tokens == 1
    assert one.tokens_per_second is None
    assert one.decode_seconds == 0


def test_generate_samples_by_seed_and_leaves_the_global_generator_alone():
    model, tokenizer = tiny.llama(initializer_range=0.02), tiny.tokenizer()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    texts = [generate(model, tokenizer, "w1", 12, temperature=1.0, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.get_rng_state())


def test_generate_uses_the_chat_template():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    tokenizer.chat_template = "w90 {% for m in messages %}{{ m['content'] }}{% endfor %} w91"
    assert generate(model, tokenizer, "w1 w2", 2).prompt_tokens == 4
    assert generate(model, tokenizer, "w1 w2", 2, chat=False).prompt_tokens == 2
    expected = greedy(model, tokenizer("w90 w1 w2 w91")["input_ids"], 2)
    assert generate(model, tokenizer, "w1 w2", 2).text == tokenizer.decode(expected, skip_special_tokens=True)


def test_generate_with_t5():
    model, tokenizer = tiny.t5(), tiny.tokenizer()
    out = generate(model, tokenizer, "w1 w2", max_new_tokens=4)
    assert out.prompt_tokens == 2
    assert out.new_tokens >= 1


def test_generate_stops_at_the_context_and_refuses():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    assert generate(model, tokenizer, tiny.words(60), max_new_tokens=50).new_tokens <= 4
    for prompt, message in ((tiny.words(64), "context is 64"), ("", "empty")):
        with pytest.raises(PumiceError, match=message):
            generate(model, tokenizer, prompt)
    with pytest.raises(PumiceError, match="max_new_tokens = 0"):
        generate(model, tokenizer, "w1", max_new_tokens=0)
    with pytest.raises(PumiceError, match="tokenizer"):
        generate(model, None, "w1")
    with pytest.raises(PumiceError, match="language model"):
        generate(tiny.bert(), tokenizer, "w1")


def test_bench_of_two_models():
    dense, sparse = tiny.llama(0), tiny.llama(1).to(torch.bfloat16)
    result = bench({"sparse": sparse, "dense": dense}, batch=(1, 3), threads=1, tokenizer=tiny.tokenizer(), **QUICK)
    assert [(row.name, row.batch) for row in result.rows] == [
        ("dense", 1),
        ("dense", 3),
        ("sparse", 1),
        ("sparse", 3),
    ]
    for row in result.rows:
        base = result.row("dense", row.batch)
        assert row.prefill
        assert row.decode
        assert base.prefill
        assert base.decode
        assert row.forward is None
        assert row.ratios == {"prefill": row.prefill / base.prefill, "decode": row.decode / base.decode}
    assert result.row("dense", 1).ratios == {"prefill": 1.0, "decode": 1.0}
    assert result.bytes["dense"] == 2 * result.bytes["sparse"]
    assert result.settings["threads"] == 1
    assert result.settings["dtypes"]["sparse"] == "bfloat16"
    assert json.loads(json.dumps(result.to_dict()))["machine"] == {"cpu": "test"}
    with pytest.raises(KeyError):
        result.row("dense", 2)


def test_bench_interleaves_and_counts_calls():
    order = []

    class Watched(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.linear = name, nn.Linear(4, 4)

        def forward(self, x):
            order.append((self.name, len(x)))
            return self.linear(x)

    result = bench(
        {"a": Watched("a"), "b": Watched("b")}, against=None, batch=(1, 2), repeats=2, inputs=torch.ones(1, 4)
    )
    assert order == [("a", 1), ("a", 2), ("b", 1), ("b", 2)] * 3
    assert all(row.forward and row.prefill is None and row.ratios == {} for row in result.rows)


def test_bench_medians(monkeypatch):
    ticks = iter([0.0, 9.0, 10.0, 11.0, 20.0, 24.0, 30.0, 32.0])
    monkeypatch.setattr("pumice.engine.bench.time.perf_counter", lambda: next(ticks))
    result = bench(nn.Linear(4, 4), against=None, batch=8, repeats=3, inputs=torch.ones(1, 4))
    # The first round (9 s) warms up; 1, 4 and 2 s count, and 8 examples in 2 s are 4 a second.
    assert result.rows[0].forward == 4.0


def test_bench_makes_dense_from_a_copy(monkeypatch):
    packed = nn.Linear(4, 4)
    seen = []
    module = types.ModuleType("pumice.engine.pack")
    module.unpack = lambda model: seen.append(model) or model  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "pumice.engine.pack", module)
    result = bench(packed, batch=1, repeats=1, inputs=torch.ones(2, 4))
    assert [row.name for row in result.rows] == ["dense", "sparse"]
    assert seen
    assert seen[0] is not packed
    given = bench(packed, against=nn.Linear(4, 8), batch=1, repeats=1, inputs=torch.ones(2, 4))
    assert given.bytes == {"dense": 160, "sparse": 80}


def test_bench_of_an_image_model_needs_no_inputs():
    """The config says how large its pictures are; each model gets them in its own type."""
    result = bench({"dense": tiny.vit(), "sparse": tiny.vit().to(torch.bfloat16)}, batch=(1, 2), **QUICK)
    assert all(row.forward and row.prefill is None for row in result.rows)
    assert result.settings["prompt_tokens"] is None


def test_rows_that_layers_see():
    assert rows_of(tiny.llama(), (1, 16), 128) == [1, 16]
    assert rows_of(tiny.bert(), (1, 2), 24) == [24, 48]
    # 16 x 16 pixels in patches of 8 x 8.
    assert rows_of(tiny.vit(), (1, 3), 128) == [4, 12]


def test_bench_of_encoders_and_t5():
    for model in (tiny.bert(), tiny.t5()):
        row = bench(model, against=None, batch=2, **QUICK).rows[0]
        assert row.prefill
        assert row.decode is None


def test_bench_restores_threads_and_mode():
    before, model = torch.get_num_threads(), tiny.llama().train()
    bench(model, against=None, batch=1, threads=1, **QUICK)
    assert torch.get_num_threads() == before
    assert model.training


def test_bench_refuses():
    model = tiny.llama()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch": ()}, "batch"),
        ({"batch": (0,)}, "batch"),
        ({"repeats": 0}, "repeats"),
        ({"prompt_tokens": 60, "new_tokens": 10}, "context of 64"),
        ({"against": "sparse"}, "against = 'sparse'"),
        ({"threads": 0}, "threads = 0"),
    ]
    for options, message in cases:
        with pytest.raises(PumiceError, match=message):
            bench(model, **({"against": None, "batch": 1} | QUICK | options))
    with pytest.raises(PumiceError, match="example inputs"):
        bench(nn.Linear(2, 2), against=None)
    with pytest.raises(PumiceError, match="empty"):
        bench({})


def test_model_bytes_counts_storages_once():
    model = tiny.llama(tie_word_embeddings=True)
    untied = tiny.llama(tie_word_embeddings=False)
    assert model_bytes(untied) - model_bytes(model) == 100 * 32 * 4
    linear = nn.Linear(4, 4, bias=False)
    linear.register_buffer("view", linear.weight.detach()[:2])
    linear.register_buffer("other", torch.zeros(3, dtype=torch.uint8))
    linear.register_buffer("nothing", torch.zeros(0))
    assert model_bytes(linear) == 64 + 3
