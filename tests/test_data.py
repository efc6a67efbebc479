"""Text and tensors in: sources, windows, and model inputs from whatever a user has."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pumice.core.errors import PumiceError
from pumice.engine.data import (
    calibration_windows,
    default_text,
    evaluation_windows,
    halves,
    load_text,
    make_data,
    tokenize,
    windows_from_documents,
)
from tests import tiny
from tests.conftest import shared


def test_default_text_has_two_disjoint_halves():
    ours, theirs = default_text("calibration"), default_text("evaluation")
    assert ours == default_text("calibration") == load_text(None)
    assert theirs == load_text(None, purpose="evaluation")
    assert min(len(ours), len(theirs)) > 50_000

    def paragraphs(text):
        return {" ".join(part.split()) for part in text.split("\n\n") if part.strip()}

    assert not paragraphs(ours) & paragraphs(theirs)


def test_files(tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text("one\ntwo\nthree\nfour\n", encoding="utf-8")
    assert load_text(plain) == "one\ntwo\nthree\nfour\n"
    assert [load_text(f"{plain}#{half}") for half in ("first", "second")] == ["one\ntwo\n", "three\nfour\n"]
    stories = tmp_path / "stories.txt"
    stories.write_text("\n a <|endoftext|>\nb\n<|endoftext|>c<|endoftext|>\n", encoding="utf-8")
    assert load_text(str(stories)) == ["a", "b", "c"]
    assert load_text(f"{stories}#second") == ["b", "c"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "7", "text": "x"}\n\n{"body": "y"}\n"z"\n', encoding="utf-8")
    assert load_text(rows) == ["x", "y", "z"]


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.table({"id": [1, 2], "text": ["x", "y"]}), tmp_path / "rows.parquet")
    assert load_text(tmp_path / "rows.parquet") == ["x", "y"]


def test_unreadable_sources(tmp_path):
    with pytest.raises(PumiceError, match="does not exist"):
        load_text(tmp_path / "none.txt")
    with pytest.raises(PumiceError, match="is a folder"):
        load_text(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(PumiceError, match="cannot be read"):
        load_text(tmp_path / "bad.jsonl")
    (tmp_path / "empty.jsonl").write_text('{"n": 1}\n', encoding="utf-8")
    with pytest.raises(PumiceError, match="no text"):
        load_text(tmp_path / "empty.jsonl")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(PumiceError, match="cannot be read"):
        load_text(tmp_path / "latin.txt")


def test_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def fake(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        if streaming and name == "cached":
            raise ConnectionError("offline")
        if name == "absent":
            raise RuntimeError("not found")
        return [{"text": "x"}, {"text": ""}, {"text": "y"}]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load_text("wikitext:wikitext-2-raw-v1:test") == "x\n\ny"
    assert asked == [("wikitext", "wikitext-2-raw-v1", "test", True)]
    assert load_text("cached") == ["x", "y"]
    assert asked[-1] == ("cached", None, "train", False)
    with pytest.raises(PumiceError, match=r"no local file.*network"):
        load_text("absent")


def test_calibration_windows_are_slices_with_random_starts():
    tokenizer, text = tiny.tokenizer(), tiny.words(300)
    stream = tokenize(text, tokenizer)
    windows = calibration_windows(text, tokenizer, samples=20, seqlen=16, seed=3)
    assert windows.shape == (20, 16)
    assert windows.dtype == torch.long
    slices = {tuple(stream[i : i + 16].tolist()) for i in range(300 - 16 + 1)}
    assert all(tuple(window.tolist()) in slices for window in windows)
    assert len({tuple(window.tolist()) for window in windows}) > 10
    assert torch.equal(windows, calibration_windows(text, tokenizer, samples=20, seqlen=16, seed=3))
    assert not torch.equal(windows, calibration_windows(text, tokenizer, samples=20, seqlen=16, seed=4))
    assert torch.equal(calibration_windows(text, tokenizer, samples=1, seqlen=300)[0], stream)


def test_too_short_says_what_is_there_and_what_is_needed():
    with pytest.raises(PumiceError, match=r"30 tokens.*seqlen = 64"):
        calibration_windows(tiny.words(30), tiny.tokenizer(), seqlen=64)
    with pytest.raises(PumiceError, match=r"30 tokens.*seqlen = 64"):
        evaluation_windows(tiny.words(30), tiny.tokenizer(), 64)
    with pytest.raises(PumiceError, match=r"data='short\.txt' is too short: it has 30 tokens"):
        evaluation_windows(tiny.words(30), tiny.tokenizer(), 64, source="short.txt")
    with pytest.raises(PumiceError, match="samples = 0"):
        calibration_windows(tiny.words(30), tiny.tokenizer(), samples=0, seqlen=4)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "none.txt").write_text(" \n")
    with pytest.raises(PumiceError, match=r"none\.txt' is empty"):
        load_text(tmp_path / "none.txt")


def test_evaluation_windows_are_consecutive():
    tokenizer, text = tiny.tokenizer(), tiny.words(50)
    windows = evaluation_windows(text, tokenizer, 16)
    assert windows.shape == (3, 16)
    assert torch.equal(windows.reshape(-1), tokenize(text, tokenizer)[:48])
    assert torch.equal(evaluation_windows(text, tokenizer, 16, max_windows=2), windows[:2])


def test_documents_start_with_bos():
    tokenizer, docs = tiny.tokenizer(bos=True), ["w1 w2", "w3"]
    expected = torch.tensor([1, 5, 6, 1, 7])
    assert torch.equal(tokenize(docs, tokenizer), expected)
    assert torch.equal(windows_from_documents([" w1 w2\n", "w3"], tokenizer, 9, 5)[0], expected)
    assert torch.equal(tokenize(docs, tiny.tokenizer()), torch.tensor([5, 6, 7]))
    assert windows_from_documents(docs, tokenizer, 7, 2, random=True).shape == (7, 2)
    assert halves(["a", "b", "c"]) == (["a"], ["b", "c"])


def test_protocol_of_stories(stories):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    docs = load_text(shared("data", "lm_text", "tinystories_sample.txt"))
    assert len(docs) == 1093
    windows = windows_from_documents(halves(docs)[1], tokenizer, 192, 256)
    assert windows.shape == (192, 256)
    assert windows[0, 0] == 1
    assert torch.equal(windows, evaluation_windows(halves(docs)[1], tokenizer, 256, 192))


def test_make_data_from_text(tmp_path):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    (tmp_path / "a.txt").write_text(tiny.words(500), encoding="utf-8")
    batches = make_data(model, tokenizer, tmp_path / "a.txt", samples=5, seqlen=1000, batch_size=2)
    # The context of the tiny model is 64 tokens.
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 64), (2, 64), (1, 64)]
    assert len(make_data(model, tokenizer, None, samples=3)) == 3
    with pytest.raises(PumiceError, match="tokenizer"):
        make_data(model, None, None)


def test_make_data_for_encoders_and_t5():
    tokenizer, docs = tiny.tokenizer(), [tiny.words(400)]
    ids = make_data(tiny.bert(), tokenizer, docs, samples=2, seqlen=32)[0]["input_ids"]
    assert ids[0, 0] == tokenizer.cls_token_id
    assert ids[0, -1] == tokenizer.sep_token_id
    model = tiny.t5()
    batch = make_data(model, tokenizer, docs, samples=2, seqlen=32)[0]
    assert batch["decoder_input_ids"][0, 0] == 0
    assert model(**batch).logits.shape == (1, 32, 100)
    with pytest.raises(PumiceError, match="does not read text"):
        make_data(tiny.vit(), tokenizer, docs)


def test_make_data_from_tensors():
    mlp = nn.Sequential(nn.Linear(4, 3))
    x, y = torch.randn(10, 4), torch.arange(10)
    for data in (x, [x[:5], x[5:]], DataLoader(TensorDataset(x, y), batch_size=5)):
        batches = make_data(mlp, None, data, samples=8, batch_size=5)
        assert len(batches) == 2
        assert mlp(**batches[0]).shape == (5, 3)
        assert torch.equal(next(iter(batches[0].values())), x[:5])
    ids = torch.arange(32).view(4, 8)
    assert make_data(tiny.llama(), None, ids, samples=2)[1]["input_ids"].tolist() == [ids[1].tolist()]
    assert make_data(tiny.llama(), None, [{"input_ids": ids, "labels": None}]) == [{"input_ids": ids}]
    images = make_data(tiny.vit(), None, torch.randn(2, 3, 16, 16))
    assert list(images[0]) == ["pixel_values"]


def test_make_data_refuses():
    mlp = nn.Sequential(nn.Linear(4, 3))
    for data, message in (([], "empty"), (3, "is a int"), ([object()], "object")):
        with pytest.raises(PumiceError, match=message):
            make_data(mlp, None, data)
    with pytest.raises(PumiceError, match="does not read text"):
        make_data(mlp, None, json.dumps("text"))
