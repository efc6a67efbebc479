"""The report: its numbers say who wins, its page asks nobody for anything, its data comes back as it was."""

import base64
import html.parser
import json
import re
import zlib

import pytest
import torch

from pumice.analyze import masks, plots, summary
from pumice.core.errors import PumiceError
from pumice.report import Column, Point, Run, Sentences, Speed, read_runs, render, save_run, write_report


def layers(count=3, density=0.5):
    names = [f"model.layers.{i}.mlp.{kind}.weight" for i in range(count) for kind in ("up_proj", "down_proj")]
    return [
        {
            "name": name,
            "block": name[:14],
            "shape": [48, 32],
            "density": density,
            "asked": density,
            "error": 0.1 + 0.01 * i,
            "weight_error": 0.2,
            "seconds": 0.5,
            "method": "wanda",
            "notes": ["damped more"] if i == 0 else [],
        }
        for i, name in enumerate(names)
    ]


def run(title="wanda, 50 %", density=0.5, perplexity=30.0, **changes):
    dense = Column("dense bf16", 1.0, perplexity=20.0, seqlen=128, windows=4, disk_bytes=1000, memory_bytes=1000)
    dense.speed = [Speed(1, prefill=100.0, decode=10.0), Speed(16, prefill=200.0, decode=100.0)]
    sparse = Column("sparse bf16", density, perplexity=perplexity, seqlen=128, windows=4, kl=0.3, top1=0.7)
    sparse.disk_bytes, sparse.memory_bytes = 570, 575
    sparse.speed = [Speed(1, prefill=80.0, decode=15.0), Speed(16, prefill=200.5, decode=90.0)]
    facts = {
        "command": "pumice prune tiny -o OUT --density 0.5",
        "title": title,
        "model": {"name": "tiny", "input_bytes": 300, "input_format": "GGUF"},
        "recipe": {"name": title.split(",")[0], "paper": "arXiv:2306.11695"},
        "prune": {
            "density": density,
            "seconds": 1.5,
            "layers": layers(density=density),
            "recipe": {"density": density},
        },
        "columns": [dense, sparse],
        "kept": [{"name": "lm_head", "reason": "the head is ignored"}],
        "generations": [Sentences("Say <hi> & go", {"dense bf16": "Hi!", "sparse bf16": "<script>alert(1)</script>"})],
        "notes": ["calibrated on Python's text"],
        "versions": {"torch": "2.x"},
        "machine": {"cpu": "Some CPU", "date": "2026-01-02", "cpu_features": ["avx2", "fma"]},
    }
    return Run(**{**facts, **changes})


class Page(html.parser.HTMLParser):
    """Addresses that a browser would fetch by itself, links, the text, and tags left open."""

    void = frozenset({"meta", "img", "br", "hr", "input", "link", "path", "use", "rect"})

    def __init__(self, text):
        super().__init__()
        self.fetched, self.links, self.words, self.open, self.scripts = [], [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.scripts += tag == "script"
        self.fetched += [found[key] for key in ("src", "srcset", "data", "poster") if key in found]
        if tag in ("link", "use", "image"):
            self.fetched.append(found.get("href") or found.get("xlink:href"))
        if tag == "a":
            self.links.append(found["href"])
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def cells(table, label):
    return next(row for row in table.rows if row.label.startswith(label)).cells


def test_the_table_says_who_wins_in_every_row():
    table = summary.summarise([run()])
    assert table.columns == ["dense bf16", "sparse bf16"]
    said = {label: cells(table, label)[1] for label in ("Perplexity", "On disk", "In memory", "Same next token")}
    assert (said["Perplexity"].text, said["Perplexity"].against, said["Perplexity"].ahead) == (
        "30.00",
        "+50 %",
        "dense",
    )
    assert (said["On disk"].against, said["On disk"].ahead) == ("-43 %", "sparse")
    assert said["Same next token"].ahead == ""
    assert cells(table, "Decode, batch 1,")[1].ahead == "sparse"
    assert cells(table, "Prefill, batch 1,")[1] == summary.Cell("80", "0.80×", "dense")
    assert cells(table, "Prefill, batch 16")[1].ahead == "equal"
    assert [label for _, label in table.dense_wins] == [
        "Perplexity (128-token windows)",
        "Prefill, batch 1, tokens/s",
        "Decode, batch 16, tokens/s",
    ]
    assert cells(table, "Perplexity")[0].ahead == ""


def test_tasks_are_compared_in_points_by_the_normalised_accuracy():
    one = run()
    one.columns[0].tasks = {"piqa": {"acc": 0.5, "acc_norm": 0.62}}
    one.columns[1].tasks = {"piqa": {"acc": 0.9, "acc_norm": 0.6}, "extra": {"acc": 0.3}}
    table = summary.summarise([one])
    assert cells(table, "piqa")[1] == summary.Cell("60.0 %", "-2.0 points", "dense")
    assert [cell.text for cell in cells(table, "extra")] == ["–", "30.0 %"]


def test_the_verdict_names_both_sides():
    text = summary.verdict(run())
    assert text.startswith("50.0 % of the weights of the pruned layers kept: perplexity goes from 20.00 to 30.00")
    assert "43 % smaller on disk" in text
    assert "decode at 1.50× the speed of dense" in text
    assert "prefill at 0.80× the speed of dense" in text
    assert summary.verdict(Run()) == ""


def test_sizes_and_numbers_read_well():
    assert [summary.size_text(n) for n in (999, 98_200_000, 12_345, 1_234_000_000)] == [
        "999 B",
        "98.2 MB",
        "12.3 kB",
        "1.23 GB",
    ]
    assert [summary.number(n) for n in (0.1234, 12.34, 1234.5)] == ["0.123", "12.3", "1,234"]


def test_a_run_comes_back_from_its_json(tmp_path):
    one = run(masks=[masks.picture("a", torch.eye(4))], curve=[Point(0.5, 30.0, decode=15.0)])
    _, data = write_report(tmp_path, [one])
    back = read_runs(tmp_path)
    assert len(back) == 1
    assert json.loads(data.read_text()) == json.loads(json.dumps(one.to_dict()))
    assert back[0].columns == one.columns
    assert back[0].curve == one.curve
    assert back[0].generations == one.generations
    write_report(tmp_path / "both", [one.to_dict(), run("magnitude, 50 %")])
    assert [r.title for r in read_runs(tmp_path / "both")] == ["wanda, 50 %", "magnitude, 50 %"]


@pytest.mark.parametrize("count", [1, 2])
def test_the_page_asks_nobody_for_anything(tmp_path, count):
    pytest.importorskip("matplotlib")
    runs = [run(masks=[masks.picture("a", torch.eye(4))]), run("obs, 70 %", 0.7, 24.0)][:count]
    page_file, _ = write_report(tmp_path, runs)
    text = page_file.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(address.startswith(("data:", "#")) for address in page.fetched if address)
    assert page.scripts == 0
    assert "<!doctype html>" in text
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    assert page.links
    assert set(page.links) == {"https://arxiv.org/abs/2306.11695"}


def test_the_page_holds_all_that_was_recorded():
    one = run(masks=[masks.picture("model.layers.0.mlp.up_proj.weight", torch.eye(80))])
    one.packed = [
        {
            "name": "l0",
            "shape": [48, 32],
            "density": 0.5,
            "layout": "bitmask",
            "backends": {1: "decode"},
            "ms": {1: 0.5},
            "dense_ms": {1: 0.75},
            "reason": "bitmask is 1.5x as fast",
        }
    ]
    text = Page(render([one])).text
    for wanted in (
        "dense wins",
        "sparse wins",
        "Input file (GGUF): 300 B on disk",
        "4 non-overlapping windows of 128 tokens",
        "lm_head the head is ignored",
        "pumice prune tiny -o OUT --density 0.5",
        "Some CPU",
        "avx2, fma",
        "torch 2.x",
        "damped more",
        "calibrated on Python's text",
        "first 64 × 64 weights",
        "bitmask is 1.5x as fast",
        "0.500 0.750",
        "Say <hi> & go",
        "<script>alert(1)</script>",
        "Pruning took 1.5 s",
    ):
        assert wanted in text, wanted


def test_plots_follow_the_page_and_show_every_kind_of_layer():
    pytest.importorskip("matplotlib")
    found = plots.layer_plots(run())
    assert [plot.title for plot in found] == ["Density of each layer", "Error of each layer"]
    for plot in found:
        assert plot.svg.startswith("<svg")
        assert "var(--ink)" in plot.svg
        assert plots.INK not in plot.svg
        assert "xmlns" not in plot.svg
        assert "up_proj" in plot.svg
    ids = [set(re.findall(r'id="([mp][0-9a-f]{8,})"', plot.svg)) for plot in found]
    assert not ids[0] & ids[1]


def test_a_comparison_has_curves_over_density():
    pytest.importorskip("matplotlib")
    runs = [run("wanda, 50 %", 0.5, 30.0), run("wanda, 70 %", 0.7, 24.0), run("obs, 50 %", 0.5, 26.0)]
    points = plots.curve_points(runs, "perplexity")
    assert points == {"wanda": [(0.5, 30.0), (0.7, 24.0)], "obs": [(0.5, 26.0)]}
    assert plots.curve_points(runs, "decode")["wanda"] == [(0.5, 1.5), (0.7, 1.5)]
    titles = [plot.title for plot in plots.curve_plots(runs)]
    assert titles[0] == "Quality against density"
    assert "Decode speed against density" in titles
    assert plots.curve_plots(runs[:1]) == []
    table = summary.summarise(runs)
    assert table.columns == ["dense bf16", *(f"{one.title}: sparse bf16" for one in runs)]
    assert not table.merged


def test_each_run_is_compared_with_its_own_dense_times():
    runs = [run("wanda, 50 %"), run("obs, 50 %")]
    runs[1].columns[0].speed[0].decode = 20.0
    table = summary.summarise(runs)
    assert len(table.columns) == 3
    assert table.merged
    assert [cell.against for cell in cells(table, "Decode, batch 1,")] == ["", "1.50×", "0.75×"]
    assert "dense times of its own run" in Page(render(runs)).text
    runs[1].columns[0].perplexity = 21.0
    assert len(summary.summarise(runs).columns) == 4


def test_a_sweep_of_one_run_is_drawn():
    sweep = [Point(d, 20 / d, decode=10 / d, prefill=100.0, top1=d) for d in (0.5, 0.7, 0.9)]
    assert plots.curve_points([run(curve=sweep)], "decode") == {
        "wanda, 50 %": [(0.5, 2.0), (0.7, pytest.approx(10 / 7)), (0.9, pytest.approx(10 / 9))]
    }


def test_sparse_is_compared_with_the_best_dense_column():
    one = run()
    packed = Column("dense bf16, packed", 1.0, perplexity=20.0, disk_bytes=1000, memory_bytes=1500)
    packed.speed = [Speed(1, prefill=150.0, decode=20.0)]
    one.columns.insert(1, packed)
    table = summary.summarise([one])
    assert [cell.ahead for cell in cells(table, "Decode, batch 1,")] == ["", "", "dense"]
    assert cells(table, "Decode, batch 1,")[2].against == "0.75×"
    assert cells(table, "In memory")[2].against == "-43 %"
    assert "decode at 0.75× the speed of dense" in summary.verdict(one)
    assert plots.curve_points([one], "decode") == {"wanda": [(0.5, 0.75)]}
    assert "best of the dense columns" in Page(render([one])).text


def test_a_sweep_over_methods_has_a_line_each():
    sweep = [Point(0.5, 3.0, label="a", series="wanda"), Point(0.7, 2.0, series="wanda"), Point(0.5, 2.5, series="obs")]
    found = plots.curve_points([run(curve=sweep)], "perplexity")
    assert found == {"wanda": [(0.5, 3.0), (0.7, 2.0)], "obs": [(0.5, 2.5)]}


def test_without_matplotlib_the_page_still_comes(monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    text = render([run(curve=[Point(0.5, 30.0), Point(0.7, 24.0)])])
    page = Page(text)
    assert "pip install 'pumice[report]'" in page.text
    assert "<svg" not in text
    assert "model.layers.2.mlp.down_proj.weight" in page.text
    assert "Measured densities" in page.text


def decode_png(text):
    raw = base64.b64decode(text)
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")
    start = raw.index(b"IDAT")
    length = int.from_bytes(raw[start - 4 : start], "big")
    body = raw[start + 4 : start + 4 + length]
    assert zlib.crc32(b"IDAT" + body).to_bytes(4, "big") == raw[start + 4 + length : start + 8 + length]
    rows = torch.frombuffer(bytearray(zlib.decompress(body)), dtype=torch.uint8).view(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:]


def test_a_mask_picture_shows_the_mask():
    mask = torch.rand(40, 70, generator=torch.Generator().manual_seed(0)) < 0.3
    found = masks.picture("layer", mask * 2.0)
    assert torch.equal(decode_png(found.png_base64) > 0, mask)
    assert torch.equal(decode_png(found.corner_base64) > 0, mask[:64, :64])
    assert found.corner == (40, 64)
    assert found.density == pytest.approx(mask.float().mean().item())
    large = masks.picture("large", torch.ones(600, 300))
    assert decode_png(large.png_base64).shape == (256, 256)


def test_pictures_of_stored_and_dense_layers():
    from pumice.weights.layouts.base import pack
    from pumice.weights.modules import SparseLinear

    weight = torch.randn(8, 16) * (torch.rand(8, 16) < 0.5)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), SparseLinear(pack(weight, "bitmask")))
    found = masks.pictures(model, ["0.weight", "1.weight", "absent"])
    assert [one.layer for one in found] == ["0.weight", "1.weight"]
    assert torch.equal(decode_png(found[1].png_base64) > 0, weight != 0)


def test_layers_worth_a_picture():
    rows = layers(5)
    rows[4]["density"], rows[7]["error"] = 0.1, 0.9
    chosen = masks.choose_layers(rows)
    assert chosen == [rows[i]["name"] for i in (0, 4, 7, 9)]
    assert masks.choose_layers([]) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "is not a Pumice report"),
        ('{"format": 99}', "format 99, newer than the 1 known here: upgrade"),
        ("[1]", "is not a Pumice report"),
        ("{", "cannot be read"),
        ('{"format": 1, "columns": [{}]}', "is damaged"),
    ],
)
def test_a_bad_report_file_is_refused(tmp_path, content, said):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(PumiceError, match=said):
        read_runs(tmp_path)


def test_a_folder_without_report_is_refused(tmp_path):
    with pytest.raises(PumiceError, match=r"has no report.json and is no Pumice checkpoint"):
        read_runs(tmp_path)
    with pytest.raises(PumiceError, match="runs is empty"):
        write_report(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def test_json_has_no_infinity(tmp_path):
    one = run()
    one.columns[1].perplexity = float("inf")
    path = save_run(tmp_path, one)
    assert "Infinity" not in path.read_text()
    assert read_runs(tmp_path)[0].columns[1].perplexity is None
