"""The demo's own steps, on a tiny model in the place of SmolLM2."""

import json

from pumice import demo
from tests import tiny


def test_the_demo_writes_model_and_report(tmp_path, monkeypatch):
    folder = tmp_path / "tiny"
    tiny.llama().save_pretrained(folder)
    tokens = tiny.tokenizer()
    tokens.save_pretrained(folder)
    text = " ".join(f"w{i % 95}" for i in range(4000))
    monkeypatch.setattr(demo, "demo_model", lambda: folder)
    monkeypatch.setattr(demo, "default_text", lambda purpose: text)
    monkeypatch.setattr(demo, "DENSITIES", (0.9, 0.3))
    settings = demo.Settings(tmp_path / "out", samples=4, seqlen=32, windows=3)
    settings.out.mkdir()
    run = demo.Demo(settings).run()
    assert [point.density for point in run.curve] in ([1.0, 0.9, 0.3], [1.0, 0.9, 0.3, 0.3], [1.0, 0.9, 0.9])
    assert [column.name for column in run.columns] == ["dense fp32", "dense fp32, packed", "sparse fp32"]
    assert run.columns[-1].perplexity is not None
    assert run.columns[-1].disk_bytes < run.columns[0].disk_bytes
    assert all(column.speed and column.speed[0].decode for column in run.columns)
    assert run.generations[0].texts.keys() == {column.name for column in run.columns} - {"dense fp32, packed"}
    assert (settings.out / "model" / "config.json").exists()
    assert not (settings.out / "next").exists()
    json.dumps(run.to_dict())
