"""The command line on real runs of a tiny model: every verb, its JSON, its refusals, its interruption."""

import json
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import pumice.prune.run
from pumice import recipe as recipes
from pumice.cli import app
from pumice.moe.recipes import recipes as moe_recipes
from tests import tiny

VERBS = (
    "prune",
    "repair",
    "shrink",
    "eval",
    "bench",
    "pack",
    "generate",
    "export",
    "report",
    "search",
    "methods",
    "doctor",
)
SMALL = ["--samples", "2", "--seqlen", "16"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, text to calibrate and evaluate on, and the model pruned once."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(tiny.words(2000))
    result = run("prune", folder / "model", "-o", folder / "pruned", "--method", "sparsegpt", "--density", "0.5",
                 "--data", folder / "text.txt", *SMALL, "--json")  # fmt: skip
    (folder / "result.json").write_text(result.stdout)
    return folder


def call(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def run(*arguments):
    """A command that must succeed."""
    result = call(*arguments)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result


def found(*arguments):
    """The JSON of a command, which must be all there is on stdout."""
    return json.loads(run(*arguments, "--json").stdout)


def refused(*arguments):
    """The one line of a command that must be refused."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def prune(place, out, *more):
    """A quick pruning that needs no data."""
    return ("prune", place / "model", "-o", out, "--method", "magnitude", "--density", "0.5", *more)


def test_help_lists_every_verb_without_importing_torch():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from pumice.cli import app\n"
        "for arguments in (['--help'], ['prune', '--help'], ['bench', '--help']):\n"
        "    result = CliRunner().invoke(app, arguments)\n"
        "    assert result.exit_code == 0, result.output\n"
        "    print(result.stdout)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for verb in VERBS:
        assert f"\n  {verb} " in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb):
    assert "--json" in run(verb, "--help").stdout


def test_the_options_of_prune_are_the_fields_of_a_recipe():
    text = run("prune", "--help").stdout
    for name in set(recipes.schema()) - set(recipes.ABOUT):
        assert f"--{name} " in text
    for name in (
        "--out",
        "--method",
        "--recipe",
        "--set",
        "--device",
        "--dtype",
        "--dry-run",
        "--resume",
        "--overwrite",
    ):
        assert name in text


def test_prune_writes_a_checkpoint_that_transformers_reads(place):
    from transformers import AutoModelForCausalLM

    result = json.loads((place / "result.json").read_text())
    assert result["density"] == pytest.approx(0.5, abs=0.01)
    assert len(result["layers"]) == 14
    assert result["disk_bytes"]["sparse"] < result["disk_bytes"]["dense"]
    model = AutoModelForCausalLM.from_pretrained(place / "pruned")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert float((weight != 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    record = json.loads((place / "pruned" / "report.json").read_text())
    assert record["command"].split()[0] == "pumice"
    assert record["prune"]["layers"] == result["layers"]
    assert {layer["name"] for layer in record["kept"]} >= {"lm_head"}


def test_prune_for_people_ends_in_what_it_did(place, tmp_path):
    text = run(*prune(place, tmp_path / "out")).stdout
    assert "magnitude: 14 layers pruned" in text
    assert "50.0 % of their weights are kept" in text
    assert "pumice report" in text


def test_a_recipe_file_is_the_same_as_its_options(place, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "score: wanda\nrecover: {name: obs, damp: 0.05}\ndensity: 0.4\nignore: [lm_head, '*down_proj']\n"
        f"data: {place / 'text.txt'}\nsamples: 2\nseqlen: 16\n"
    )
    one = found("prune", place / "model", "-o", tmp_path / "a", "--recipe", file)
    two = found("prune", place / "model", "-o", tmp_path / "b", "--method", "wanda", "--recover", "obs", "--set",
                "recover.damp=0.05", "--density", "0.4", "--ignore", "lm_head,*down_proj", "--data", place / "text.txt",
                *SMALL)  # fmt: skip
    assert one["recipe"]["name"] == "mine"
    assert one["recipe"]["recover"]["damp"] == 0.05
    assert len(one["layers"]) == 12
    skip = {"seconds", "method"}
    for mine, theirs in zip(one["layers"], two["layers"], strict=True):
        assert {k: v for k, v in mine.items() if k not in skip} == {k: v for k, v in theirs.items() if k not in skip}
    more = found("prune", place / "model", "-o", tmp_path / "c", "--recipe", file, "--density", "0.6")
    assert more["density"] == pytest.approx(0.6, abs=1 / 32)


def test_a_dry_run_says_what_and_writes_nothing(place, tmp_path):
    plan = found(*prune(place, tmp_path / "out"), "--dry-run")
    assert len(plan["pruned"]) == 14
    assert "lm_head" in {layer["name"] for layer in plan["kept"]}
    assert all(layer["reason"] for layer in plan["kept"])
    assert plan["memory_bytes"] > 0
    assert plan["disk_bytes"] > 0
    text = run("prune", place / "model", "--method", "magnitude", "--density", "0.5", "--dry-run").stdout
    assert "14 layers" in text
    assert "Nothing was written" in text
    assert list(tmp_path.iterdir()) == []


def test_what_prune_refuses(place, tmp_path):
    out = tmp_path / "out"
    assert "density" in refused(*prune(place, out, "--density", "1.5"))
    assert "did you mean 'wanda'" in refused(*prune(place, out, "--method", "wandda"))
    assert "exclude each other" in refused(*prune(place, out, "--recipe", "x.yaml"))
    assert "out is missing" in refused("prune", place / "model")
    assert "did you mean 'damp'" in refused(*prune(place, out, "--recover", "obs", "--set", "recover.dam=1"))
    assert "5 does not divide" in refused("prune", place / "model", "-o", out, "-m", "wanda", "--pattern", "2:5")
    assert "nowhere" in refused("prune", tmp_path / "nowhere", "-o", out, "--density", "0.5")
    assert not out.exists()


def test_an_existing_folder_is_kept_unless_told(place, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert "overwrite" in refused(*prune(place, out))
    assert (out / "mine.txt").read_text() == "precious"
    run(*prune(place, out, "--overwrite"))
    assert (out / "config.json").exists()


def test_an_interrupted_run_says_how_to_go_on_and_does(place, tmp_path, monkeypatch):
    straight = found(*prune(place, tmp_path / "straight"))
    whole = pumice.prune.run.Pruner._prune_unit

    def interrupt_at_the_second(self, unit, collect):
        if unit.name.endswith("1"):
            raise KeyboardInterrupt
        return whole(self, unit, collect)

    monkeypatch.setattr(pumice.prune.run.Pruner, "_prune_unit", interrupt_at_the_second)
    out = tmp_path / "out"
    result = call(*prune(place, out))
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    assert str(out) in result.stderr
    assert not out.exists()
    monkeypatch.undo()
    resumed = found(*prune(place, out), "--resume")
    assert resumed["resumed_units"] == 1
    assert [row["density"] for row in resumed["layers"]] == [row["density"] for row in straight["layers"]]
    files = [(folder / "model.safetensors.index.json").exists() for folder in (out, tmp_path / "straight")]
    assert files == [True, True]


def test_an_interruption_elsewhere_is_130_too(place, monkeypatch):
    import pumice.engine.evaluate

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pumice.engine.evaluate, "evaluate", interrupt)
    result = call("eval", place / "pruned", "--data", place / "text.txt")
    assert result.exit_code == 130
    assert result.stderr.startswith("interrupted")


def test_the_process_itself_ends_in_one_line_and_code_2(place, tmp_path):
    command = [sys.executable, "-m", "pumice", "prune", str(place / "model"), "-o", str(tmp_path / "o"), "-m", "nosuch"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: unknown method 'nosuch'")
    assert "Traceback" not in result.stderr


def test_eval_beside_dense(place):
    options = ("--data", place / "text.txt", "--seqlen", "32", "--max-windows", "4", "--against", place / "model")
    result = found("eval", place / "pruned", *options)
    assert (result["windows"], result["seqlen"]) == (4, 32)
    assert result["perplexity"] > 1
    assert 0 < result["agreement"]["top1"] <= 1
    assert "perplexity (4 windows of 32 tokens)" in run("eval", place / "pruned", *options).stdout


def test_eval_of_zero_shot_tasks(place, tmp_path):
    rows = [{"query": "w1 w2", "choices": ["w3", "w4 w5"], "gold": i % 2} for i in range(4)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--data", place / "text.txt", "--seqlen", "32", "--max-windows", "1", "--tasks-dir", tmp_path)
    result = found("eval", place / "pruned", *options, "--tasks", "mine")
    assert result["tasks"]["mine"]["n"] == 4


def test_bench_names_the_measures_and_the_settings(place):
    options = ("--batch", "1,2", "--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1", "--threads", "1")
    result = found("bench", place / "pruned", *options)
    assert [(row["name"], row["batch"]) for row in result["rows"]] == [
        ("dense", 1),
        ("dense", 2),
        ("dense, packed", 1),
        ("dense, packed", 2),
        ("sparse", 1),
        ("sparse", 2),
    ]
    assert result["settings"]["threads"] == 1
    assert set(result["rows"][-1]["ratios"]) == {"prefill", "decode"}
    assert "decode tokens/s" in run("bench", place / "pruned", *options, "--no-pack", "--against", "none").stdout
    assert "batch" in refused("bench", place / "pruned", "--batch", "one")


def test_pack_gives_a_reason_for_every_layer(place):
    result = found("pack", place / "pruned", "--batch", "1")
    assert len(result["layers"]) >= 14
    assert all(layer["reason"] for layer in result["layers"])
    every = run("pack", place / "pruned", "--batch", "1", "--all").stdout
    assert "model.layers.1.mlp.down_proj" in every
    assert "give values='int8' as well" in refused("pack", place / "pruned", "--activations", "int8")


def test_generate(place):
    result = found("generate", place / "pruned", "w1 w2 w3", "--max-new-tokens", "4")
    assert result["prompt_tokens"] == 3
    assert 1 <= result["new_tokens"] <= 4
    assert (
        run("generate", place / "pruned", "w1 w2 w3", "--max-new-tokens", "4").stdout.strip() == result["text"].strip()
    )


def test_export_dense_loads_as_an_ordinary_model(place, tmp_path):
    from transformers import AutoModelForCausalLM

    result = found("export", place / "pruned", "-o", tmp_path / "dense", "--format", "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert result["bytes"] > 0
    assert "gif" in refused("export", place / "pruned", "-o", tmp_path / "x", "--format", "gif")
    assert not (tmp_path / "x").exists()


def test_report_measures_and_compares(place, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(place / "pruned", one)
    found(*prune(place, two))
    options = ("--measure", "--data", place / "text.txt", "--seqlen", "32", "--max-windows", "2", "--repeats", "1")
    for folder in (one, two):
        made = found("report", folder, *options, "--prompt", "w1 w2")
        assert made["html"] == str(folder / "report.html")
    record = json.loads((one / "report.json").read_text())
    dense, sparse = record["columns"]
    assert (dense["name"], sparse["name"]) == ("dense fp32", "sparse fp32")
    assert dense["perplexity"] > 0
    assert sparse["top1"] is not None
    assert sparse["disk_bytes"] < dense["disk_bytes"]
    assert dense["speed"][0]["decode"] > 0
    assert len(record["masks"]) == 4
    assert record["generations"][0]["prompt"] == "w1 w2"
    assert record["packed"]
    page = (one / "report.html").read_text()
    assert "w1 w2" in page
    both = found("report", one, two, "-o", tmp_path / "both.html")
    assert len(both["runs"]) == 2
    assert "2 runs compared" in (tmp_path / "both.html").read_text()
    again = found("report", tmp_path / "both.json", "-o", tmp_path / "again.html")
    assert again["runs"] == both["runs"]
    assert "dense wins" in run("report", one).stdout


def test_report_times_an_image_model(tmp_path):
    tiny.vit().save_pretrained(tmp_path / "model")
    run("prune", tmp_path / "model", "-o", tmp_path / "out", "--method", "magnitude", "--density", "0.5")
    found("report", tmp_path / "out", "--measure", "--repeats", "1")
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert all(column["speed"][0]["forward"] > 0 for column in record["columns"])
    assert {row: layer["ms"][row] > 0 for layer in record["packed"] for row in layer["ms"]} == {"4": True}
    assert any("does not read text" in note for note in record["notes"])


def test_report_refuses_what_is_no_run(place, tmp_path):
    assert "no report.json and is no Pumice checkpoint" in refused("report", place / "model")
    assert "ends in .html" in refused("report", place / "pruned", "-o", tmp_path / "page.pdf")


def test_report_of_a_checkpoint_saved_from_python(place, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(place / "pruned", folder)
    (folder / "report.json").unlink()
    made = found("report", folder)
    assert made["runs"] == ["bare"]
    assert "only what its config.json says" in (folder / "report.html").read_text()


def test_methods_lists_everything_registered(place):
    from pumice.core import registry

    rows = found("methods")
    listed = {(row["family"], row["name"]) for row in rows}
    assert listed == {(info.family, info.name) for info in registry.methods()} | {
        *(("recipe", one.name) for one in recipes.recipes()),
        *(("moe-recipe", one.name) for one in moe_recipes()),
    }
    by_name = {(row["family"], row["name"]): row for row in rows}
    assert by_name["recover", "dsnot"]["patterns"] == ["nm", "unstructured"]
    assert "nm" not in by_name["allocation", "owl"]["patterns"]
    assert "nm" in by_name["score", "wanda"]["patterns"]
    assert by_name["recipe", "dsnot-70"]["key"] == "dsnot"
    assert by_name["recipe", "dsnot-70"]["options"]["recover"] == "dsnot"
    assert by_name["recover", "obs"]["options"]["damp"]["default"] == 0.01
    assert {row["measured"] for row in rows} <= {True, False, None}


def test_methods_of_one_name_and_of_one_family():
    assert [row["family"] for row in found("methods", "obs")] == ["score", "recover"]
    assert {row["family"] for row in found("methods", "allocation")} == {"allocation"}
    assert "option damp" in run("methods", "obs").stdout
    assert "did you mean 'wanda'" in refused("methods", "wnda")


def test_measured_follows_the_committed_results(monkeypatch):
    from pumice.cli import catalog

    entry = {"score": {"name": "wanda"}, "recover": {"name": "none"}, "allocation": {"name": "uniform"}}
    entry |= {"pattern": "2:4", "density": 0.5}
    monkeypatch.setattr(catalog, "results", lambda: [entry])
    rows = {(row["family"], row["name"]): row["measured"] for row in catalog.catalogue()}
    assert rows["recipe", "wanda-2to4"] is True
    assert rows["recipe", "wanda"] is True
    assert rows["recipe", "dsnot-70"] is False
    assert rows["recipe", "sparsegpt-2to4"] is False
    assert rows["score", "wanda"] is True
    assert rows["score", "obs"] is False
    assert rows["pattern", "nm"] is True
    assert rows["layout", "nm"] is None
    monkeypatch.setattr(catalog, "results", lambda: None)
    assert {row["measured"] for row in catalog.catalogue()} == {None}


def test_doctor_has_a_reason_for_every_kernel_that_will_not_run():
    result = found("doctor")
    layouts = {row["layout"] for row in result["backends"]}
    assert layouts >= {"dense", "bitmask", "nm", "block", "csr"}
    for layout in layouts:
        assert any(row["reason"] is None for row in result["backends"] if row["layout"] == layout)
    assert all(row["reason"] is None or len(row["reason"]) > 10 for row in result["backends"])
    csr = [row for row in result["backends"] if (row["backend"], row["dtype"]) == ("mkl", "bfloat16")]
    assert all("bfloat16" in row["reason"] for row in csr)
    assert result["versions"]["torch"]
    assert all(one["hint"].startswith("pip install 'pumice[") for one in result["extras"] if one["missing"])
    text = run("doctor").stdout
    assert "bitmask" in text
    assert result["cpu"] in text
