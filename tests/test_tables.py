"""The tables of the docs are what the results and the registry say. All results in here but the first test's are made up."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAMP = {"cores": 3, "cpu": "Made Up", "kernels_in_use": "none"}


def test_tables_are_up_to_date():
    script = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """The script as a module, with an empty folder of results."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("tables")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def rows_of(text):
    """The cells of a markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")][1:]


OTHER = {
    "minilm-l6": {
        "dense": {"ndcg@10": 0.9, "cosine": 1.0},
        "weak @ 0.5": {"ndcg@10": 0.25, "cosine": 0.5, "seconds": 1234.0},
        "strong @ 0.5": {"ndcg@10": 0.75, "cosine": 0.8, "seconds": 2.0},
        "weak @ 2:4": {"ndcg@10": 0.125, "cosine": 0.3, "seconds": 3.0},
    },
    "efficientnet-lite0": {"dense": {"top1_agreement": 1.0, "kl": 0.0}},
    "protocol": "made up",
}
ARMOR = {
    "quality": {
        "rows": [
            {"method": "dense", "bits": 16.0, "perplexity": 5.0},
            {"method": "armor, blocks <= 64", "pattern": "2:4", "bits": 10.0, "perplexity": 11.0, "seconds": 7.0},
            {"method": "wanda", "pattern": "2:4", "bits": 9.0, "perplexity": 30.0, "seconds": 1.0},
            {"method": "wanda", "pattern": "5:8", "bits": 12.0, "perplexity": 10.0, "seconds": 1.0},
        ],
        "machine": STAMP,
    },
    "time": {
        "rows": [
            {"layer": "8x8", "rows": count, "form": form, "bytes": 1, "ms": ms}
            for count, found in ((1, (4.0, 1.0, 2.0, 3.0)), (16, (40.0, 10.0, 20.0, 30.0)))
            for form, ms in zip(("dense", "2:4", "5:8", "armor 2:4, blocks 4"), found, strict=True)
        ],
        "machine": STAMP,
    },
}
CHITA = {
    "rows": [
        {"method": "magnitude", "density": 0.5, "weights": 6_000_000, "gradients_bytes": 0, "seconds": 1.0}
        | {"peak_memory_bytes": 5e8, "perplexity": 17.0},
        {"method": "chita", "density": 0.5, "weights": 6_000_000, "gradients_bytes": 1.5e9, "seconds": 400.0}
        | {"peak_memory_bytes": 2.5e9, "perplexity": 10.0},
    ],
    "machine": STAMP,
}
SCRATCH = {
    "settings": {"epochs": 12, "seeds": 2, "density": 0.4},
    "rows": {
        "dense": {"accuracy": 0.7, "parameters": 1000.0, "multiplications": 5e6, "epochs": 12.0, "seconds": 1.0},
        "width, Scratch-E": {"accuracy": 0.6, "parameters": 400.0, "multiplications": 2e6, "epochs": 12.0},
        "precropping from synflow": {"accuracy": 0.5, "parameters": 400.0, "multiplications": 2e6, "epochs": 12.0},
    },
}
QUANT = {
    "stories15m": {
        "dense": {"perplexity": 6.0, "bits_per_weight": 32.0},
        "gqsa, both stages": {"perplexity": 60.0, "bits_per_weight": 2.5625, "seconds": 99.0},
        "round to nearest, int8": {"perplexity": 6.5, "bits_per_weight": 8.0, "seconds": 1.0},
    },
    "minilm": {
        "dense": {"ndcg@10": 0.5, "cosine": 1.0, "bits_per_weight": 32.0},
        "round to nearest, int8": {"ndcg@10": 0.4, "cosine": 0.9, "bits_per_weight": 8.0, "seconds": 1.0},
    },
    "speed": {
        "size": 64,
        "rows": [
            {
                "threads": 1,
                "case": "dense",
                "backend": "slow",
                "ms": 4.0,
                "of_best_dense": 0.5,
                "bits_per_weight": 16.0,
            },
            {
                "threads": 1,
                "case": "dense",
                "backend": "fast",
                "ms": 2.0,
                "of_best_dense": 1.0,
                "bits_per_weight": 16.0,
            },
            {
                "threads": 2,
                "case": "dense",
                "backend": "fast",
                "ms": 1.0,
                "of_best_dense": 1.0,
                "bits_per_weight": 16.0,
            },
            {"threads": 1, "case": "theirs", "backend": "torch.ao", "ms": 1.0, "of_best_dense": 2.0},
        ],
        "machine": STAMP,
    },
}
LARGER = {
    "model": {"bytes": 2.5e9},
    "limit_private_bytes": 1.25e9,
    "runs": [
        {"method": "wanda", "streamed": True, "outcome": "pruned", "seconds": 60.0, "disk_bytes": 1.5e9}
        | {"peak_private_bytes": 1e9, "peak_resident_bytes": 3e9},
        {"method": "wanda", "streamed": False, "outcome": "killed (-9)"},
    ],
}


def test_a_missing_file_leaves_its_section_out_and_a_missing_marker_ends_the_program(tables, tmp_path):
    page = "before\n<!-- chita -->\nold\n<!-- /chita -->\nbehind\n"
    made = {"chita": tables.measured("chita.json", tables.sections.chita)}
    assert tables.rewritten(page, made) == "before\n<!-- chita -->\n<!-- /chita -->\nbehind\n"
    (tmp_path / "chita.json").write_text(json.dumps(CHITA))
    assert "| chita, 50% zeros | 10.0 | 1.50 | 2.5 | 400 |" in tables.rewritten(page, made)
    with pytest.raises(SystemExit, match="<!-- chita -->"):
        tables.rewritten("no marker", made)


def test_other_models_are_shown_best_first_with_dense(tables):
    text = tables.sections.other(OTHER)
    assert rows_of(text)[:2] == [["strong", "0.750", "0.800", "2"], ["weak", "0.250", "0.500", "1,234"]]
    assert "all-MiniLM-L6-v2, dense 0.900" in text
    assert text.index("50 % zeros") < text.index("2:4")
    assert "EfficientNet-Lite0," not in text, "it has no rows yet"


def test_armor_shows_quality_by_bits_and_each_time_beside_its_own_plain_forms(tables):
    text = tables.sections.armor(ARMOR)
    assert [row[2] for row in rows_of(text)[:4]] == ["9.00", "10.00", "12.00", "16.00"]
    assert ["8x8, 16 rows", "40.00", "10.00", "20.00", "30.00 (blocks 4)"] in rows_of(text)
    assert "3 cores of Made Up" in text
    assert tables.sections.armor({"protocol": "nothing measured"}) == ""


def test_scratch_says_how_many_seeds_it_is_a_mean_of(tables):
    text = tables.sections.scratch(SCRATCH)
    assert "2 seeds" in text
    assert ["precropping from synflow", "50.0%", "400", "2.0", "12.0"] in rows_of(text)


def test_quantised_rows_have_bits_and_the_stages_come_last(tables):
    text = tables.sections.quantised(QUANT)
    assert [row[0] for row in rows_of(text)][:2] == ["round to nearest, int8", "gqsa, both stages"]
    assert ["round to nearest, int8", "8.00", "0.400", "0.900", "1"] in rows_of(text)
    fast = tables.sections.quantised_speed(QUANT)
    assert ["dense", "16.00", "2.00 (1.0×, fast)", "1.00 (1.0×, fast)"] in rows_of(fast)
    assert ["theirs", "", "1.00 (2.0×, torch.ao)", ""] in rows_of(fast)
    assert tables.sections.quantised_speed({}) == ""


def test_an_moe_layer_is_compared_with_the_best_other(tables):
    times = {"eager": {"ms": 3.0}, "grouped_mm": {"ms": 2.0}, "pumice": {"ms": 4.0}, "dense MLP": {"ms": 1.0}}
    machine = {"cores": 2, "cpu": "C", "kernels_in_use": "K", "threads": 2}
    entry = {"part": "few", "layer": "mixtral", "dtype": "bfloat16", "tokens": 1, "times": times, "machine": machine}
    (row,) = rows_of(tables.sections.experts({"results": [{**entry, "floor_ms": 0.5, "floor_by": "memory"}]}))
    assert row[3:] == ["4.00", "2.00 (grouped_mm)", "0.50×", "1.00", "0.50 (memory)", "4.00×"]


def test_integers_are_compared_with_both_kinds_of_dense(tables):
    kinds = ("int8, dense, PyTorch", "bf16, dense")
    ways = [
        {"case": case, "backend": backend, "ms": ms, **{f"of {kind}": 4 / ms for kind in kinds}, **more}
        for case, backend, ms, more in (
            ("int8, dense", "bytes", 2.0, {"error": 0.01}),
            ("bf16, dense", "torch", 8.0, {}),
            ("bf16, dense", "onednn", 4.0, {}),
        )
    ]
    machine = {"cores": 2, "cpu": "C", "kernels_in_use": "K"}
    layer = {"size": 64, "runs": [{"threads": 1, "rows": 16, "ways": ways}], "machine": machine}
    models = [{"model": "bf16", "perplexity": 3.0, "backends": ["onednn"], "prompt_ms": 5.0}]
    text = tables.sections_kernels.int8_rows({"layer": layer, "model": {"rows": models}})
    assert "| bf16, dense | 4.00 (1.00×, 1.00×) |  |" in text
    assert "| int8, dense: bytes | 2.00 (2.00×, 2.00×) | 1.0e-02 |" in text
    assert "| bf16 | 3.00 | 5 | onednn |" in text


def test_larger_than_memory_shows_what_failed_too(tables):
    rows = rows_of(tables.sections.larger(LARGER))
    assert rows == [
        ["wanda, from disk to disk", "pruned", "1.00", "3.00", "1.50", "60"],
        ["wanda, loaded first", "killed (-9)", "", "", "", ""],
    ]


def pruned(perplexity, **recipe):
    return {"perplexity": perplexity, "recipe": {key: {"name": value} for key, value in recipe.items()}}


def remarks_of(tables, files, **simpler):
    return tables.earned.remarks(files.get, lambda family, name: simpler.get(name))


def test_a_method_that_is_nowhere_better_says_so(tables):
    table = {
        "dense": {"perplexity": 5.0},
        "magnitude @ 0.5": pruned(20.0, score="magnitude", recover="none"),
        "good @ 0.5": pruned(10.0, score="good", recover="none"),
        "good @ 0.3": pruned(90.0, score="good", recover="none"),
        "bad @ 0.5": pruned(20.0, score="bad", recover="none"),
        "variant @ 0.5": pruned(11.0, score="variant", recover="none"),
        "good + swap @ 0.5": pruned(10.5, score="good", recover="swap"),
        "good + swap, draw 1 @ 0.5": pruned(1.0, score="good", recover="swap"),
        "some + solve @ 0.5": pruned(8.0, score="good", recover="solve", allocation="uneven"),
        "uneven + good @ 0.5": pruned(10.1, score="good", recover="none", allocation="uneven"),
        "good toward far @ 0.5": pruned(9.0, score="good", recover="none", goal="far"),
    }
    found = remarks_of(tables, {"prune_quality.json": {"stories15m": table, "protocol": "made up"}}, variant="good")
    assert found["score", "bad"] == (
        "Nowhere better than `magnitude` where measured, at best 20.0 against 20.0 (stories15M, 50 % zeros)."
    )
    assert "`good`" in found["score", "variant"], "it names a simpler method of its own"
    assert "no recovery" in found["recover", "swap"], "another draw of the windows is no comparison"
    assert "one density" in found["allocation", "uneven"]
    assert found.keys() == {("score", "bad"), ("score", "variant"), ("recover", "swap"), ("allocation", "uneven")}


def test_repairs_that_were_undone_or_gained_nothing_say_so(tables):
    table = {
        "start": {"perplexity": 40.0},
        "start + good": {"perplexity": 30.0, "kept": True},
        "start + undone": {"perplexity": 40.0, "kept": False},
        "other": {"perplexity": 50.0},
        "other + undone": {"perplexity": 51.0, "kept": True},
        "dense + good": {"perplexity": 4.0, "kept": True},
    }
    found = remarks_of(tables, {"repair_quality.json": {"stories15m": table}})
    assert found.keys() == {("repair", "undone")}
    assert "at best 40.0 against 40.0 (stories15M, start)" in found["repair", "undone"]


def test_structured_methods_are_compared_by_size_and_quality(tables):
    table = {
        "dense": {"perplexity": 5.0},
        "width": {"perplexity": 50.0, "density": 0.8},
        "better": {"perplexity": 40.0, "density": 0.795},
        "worse": {"perplexity": 60.0, "density": 0.8},
        "worse refit=dense": {"perplexity": 55.0, "density": 0.8},
        "roomy": {"perplexity": 20.0, "density": 0.95},
        "smaller": {"perplexity": 60.0, "density": 0.6},
        "none": {"refused": "made up"},
    }
    encoder = {"dense": {"ndcg@10": 0.9}, "width": {"ndcg@10": 0.5, "density": 0.8}}
    encoder |= {"worse": {"ndcg@10": 0.45, "density": 0.8}}
    files = {"shrink_quality.json": {"stories15m": table, "minilm": encoder, "protocol": "made up"}}
    found = remarks_of(tables, files)
    assert found.keys() == {("shrink", "worse")}, "more or fewer parameters are no comparison"
    encoder["worse"]["ndcg@10"] = 0.55
    assert not remarks_of(tables, files), "better on one model is enough"


def test_precropping_and_armor_are_judged_by_their_own_benchmarks(tables):
    found = remarks_of(tables, {"scratch.json": SCRATCH, "armor.json": ARMOR})
    assert found.keys() == {("shrink", "precropping")}
    assert "50.0% against 60.0%" in found["shrink", "precropping"]
    worse = json.loads(json.dumps(ARMOR))
    worse["quality"]["rows"][1]["perplexity"] = 31.0
    assert "31.0 against 30.0" in remarks_of(tables, {"armor.json": worse})["rewrite", "armor"]
    assert remarks_of(tables, {}) == {}
