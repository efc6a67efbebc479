"""The table and the remarks of the MoE comparison. All results in here are made up."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAMP = {"cores": 3, "cpu": "Made Up", "kernels_in_use": "none"}


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tables")


def row(*losses, active=100.0, causal=True, training=None, **facts):
    one = {
        "active": active,
        "active_training": training or active,
        "total": 400.0,
        "speed": 0.5,
        "load_cv": 0.25,
        "drop_rate": 0.0,
        "experts_per_token": 2.0,
    }
    seeds = {str(seed): {**one, "loss": loss, "causal": causal} for seed, loss in enumerate(losses)}
    return {"seeds": seeds, "steps": 9, **facts}


def recipe(*losses, active=100.0, causal=True, training=None, note="", layer=None, **arguments):
    more = {"note": note} if note else {}
    given = {"active": active, "causal": causal, "training": training}
    return row(*losses, **given, recipe="some", arguments=arguments, layer=layer, **more)


def results():
    mlp, gelu = "mlp", {"name": "mlp", "activation": "gelu"}
    rows = {
        "dense, equal active": row(4.5, 4.7),
        "mixtral": recipe(4.0, 4.2, router="linear", kind="swiglu"),
        "linear top-2, relu": recipe(4.1, 4.3, router="linear", kind=mlp),
        "vision-token-choice-softmax": recipe(4.05, 4.25, router="linear", kind=gelu),
        "wins": recipe(4.0, 4.25, router="good", kind=mlp),
        "once": recipe(4.0, 4.31, router={"name": "sometimes"}, kind=mlp, note="made up"),
        "never": recipe(4.2, 4.31, router="bad", kind=mlp),
        "gelu never": recipe(4.06, 4.26, assign="worse", kind=gelu),
        "future": recipe(3.0, 3.0, router="prophet", kind=mlp, causal=False),
        "future and worse": recipe(5.0, 5.0, router="blind", kind=mlp, causal=False),
        "large": recipe(3.0, 3.0, router="greedy", kind=mlp, active=200.0),
        "large training": recipe(3.0, 3.0, router="greedy", kind=mlp, training=150.0),
        "small": recipe(4.5, 4.5, router="modest", kind=mlp, active=50.0),
        "around": recipe(4.5, 4.5, layer={"name": "frame"}, kind=mlp),
        "lost": recipe(4.5, 4.5, kind="swiglu", balance=[{"name": "odd"}, "load"]),
        "refused": {"seeds": {"0": {"refused": "It could not."}}},
    }
    return {"rows": rows, "machine": STAMP}


def test_a_part_that_does_not_beat_linear_top_2_says_so(tables):
    found = tables.earned.remarks({"moe_compare.json": results()}.get, lambda family, name: None)
    assert found.keys() == {
        ("router", "bad"),
        ("router", "blind"),
        ("assign", "worse"),
        ("moe_layer", "frame"),
        ("balance", "odd"),
    }
    assert found["router", "bad"] == (
        "Nowhere better than linear top-2 of ReLU experts where measured, at best 4.255 against 4.200 "
        "(recipe `never`, trained on TinyStories and Shakespeare)."
    )
    assert "GELU" in found["assign", "worse"]


def test_the_table_is_sorted_and_says_what_makes_a_row_no_comparison(tables):
    text = tables.sections.compared(results())
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"][2:]
    cells = {line[0].strip("`"): line for line in lines}
    assert [float(line[1]) for line in lines] == sorted(float(line[1]) for line in lines)
    assert cells["dense, equal active"][1:5] == ["4.600", "4.500", "4.700", ""]
    assert cells["dense, equal active"][7:10] == ["", "", ""]
    assert {
        name: cells[name][4] for name in ("wins", "once", "never", "future", "large", "large training", "small")
    } == {
        "wins": "better",
        "once": "better in 1 of 2 seeds",
        "never": "nowhere better",
        "future": "lower, but sees the future",
        "large": "lower, with 2.0× the active parameters",
        "large training": "lower, with 1.5× the active parameters",
        "small": "higher, with 0.50× the active parameters",
    }
    assert cells["future and worse"][-1] == "not causal"
    assert cells["once"][-1] == "made up"
    assert "refused" not in cells
    assert "`refused`: It could not." in text
    assert tables.sections.compared({}) == ""


def test_an_moe_layer_with_gradients_stands_beside_loops_too(tables):
    times = {"eager": 30.0, "grouped_mm": 20.0, "pumice": 10.0, "loop": 15.0, "loop in our operators": 12.0}
    entry = {"layer": "mixtral", "dtype": "bfloat16", "part": "train-bf16", "tokens": 9, "floor_ms": 8.0}
    entry |= {"floor_by": "products", "machine": {**STAMP, "threads": 2}}
    entry["times"] = {name: {"ms": ms} for name, ms in times.items()}
    text = tables.sections.experts({"results": [entry]})
    assert "| 10.0 | 20.0 (grouped_mm) | 2.00× |" in text
    assert "takes 15.0 ms, which is 1.50 times ours" in text
    assert "12.0 ms (1.20)" in text
