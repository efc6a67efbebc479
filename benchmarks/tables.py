"""Write the measured tables into README.md and docs, from benchmarks/results and the registry.

python benchmarks/tables.py            # rewrite
python benchmarks/tables.py --check    # exit 1 if something is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import earned
import sections
import sections_kernels
from shown import ENCODER, NAMES, TITLES, machine, number, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def measured(name: str, make: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """A section that `make` makes of a results file; left out where there is none."""
    return lambda: make(read(name)) if (RESULTS / name).exists() else ""


def quality(model: str) -> str:
    """The README's table of one model: recipes and what has a figure of its authors, a column per sparsity."""
    results = read("prune_quality.json")[model]
    dense = results["dense"]["perplexity"]
    from pumice.recipe import recipes

    shown = {"magnitude", *(recipe.name for recipe in recipes() if recipe.recover not in (None, "none"))}
    kinds: dict[str, dict[str, Any]] = {}
    columns: list[str] = []
    for key, entry in results.items():
        method, _, kind = key.partition(" @ ")
        if key == "dense" or (method not in shown and entry["authors"] is None):
            continue
        kinds.setdefault(method, {})[kind] = entry
        if kind not in columns:
            columns.append(kind)
    rows = []
    for method, entries in kinds.items():
        cells = []
        for kind in columns:
            entry = entries.get(kind)
            theirs = f" ({number(entry['authors'])})" if entry and entry["authors"] is not None else ""
            cells.append(f"{number(entry['perplexity'])}{theirs}" if entry else "")
        rows.append([method, *cells])
    head = [f"{NAMES[model]}, dense {number(dense)}", *(TITLES.get(kind, kind) for kind in columns)]
    return table(head, rows)


def everything() -> str:
    """A table per model and sparsity with every measured row, best first."""
    results = read("prune_quality.json")
    parts = []
    for model, name in NAMES.items():
        dense = results[model]["dense"]["perplexity"]
        kinds: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for key, entry in results[model].items():
            method, _, kind = key.partition(" @ ")
            if kind:
                kinds.setdefault(kind, []).append((method, entry))
        for kind, found in kinds.items():
            rows = [
                [
                    method,
                    number(entry["perplexity"]),
                    number(entry["authors"]),
                    "" if entry["seconds"] is None else f"{entry['seconds']:,.0f}",
                    f"{entry['peak_memory_bytes'] / 1e9:.1f}",
                ]
                for method, entry in sorted(found, key=lambda one: one[1]["perplexity"])
            ]
            head = [f"{name}, dense {number(dense)}", "perplexity", "the authors' code", "seconds", "peak GB"]
            parts.append(f"## {name}, {TITLES.get(kind, kind)}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def both_qualities() -> str:
    stamp = read("prune_quality.json")["smollm2-135m"]["dense"]["machine"]
    seconds = read("prune_quality.json")["smollm2-135m"]
    timed = ", ".join(
        f"{key.partition(' @ ')[0]} {seconds[key]['seconds']:.0f} s" for key in ("wanda @ 0.5", "sparsegpt @ 0.5")
    )
    note = (
        "Token perplexity, lower is better; in brackets the authors' own code on the same protocol "
        "(`benchmarks/prune_quality.py`). Calibration windows are drawn at random; at 70 % the draw alone moves perplexity "
        "by more than ten per cent, so that Wanda and OWL are shown with other draws too (`theirs`: cut where the authors' "
        f"loaders cut). Time to prune SmolLM2 with 64 × 1024 tokens: {timed} "
        f"({machine(stamp)})."
    )
    return f"{quality('smollm2-135m')}\n\n{quality('stories15m')}\n\n{note}"


def demo() -> str:
    """The demo's summary table, its curve and its sentences."""
    from pumice.analyze.record import Run
    from pumice.analyze.summary import summarise, verdict

    run = Run.from_dict(read("demo.json"))
    summary = summarise([run])
    rows = []
    for row in summary.rows:
        cells = []
        for cell in row.cells:
            ahead = f", {cell.ahead} wins" if cell.ahead in ("sparse", "dense") else ""
            cells.append(f"{cell.text} ({cell.against}{ahead})" if cell.against else cell.text)
        rows.append([row.label, *cells])
    curve = ", ".join(f"{point.label} {number(point.perplexity)}" for point in run.curve)
    said = "\n".join(f"- {name}: “{' '.join(text.split())}”" for name, text in run.generations[0].texts.items())
    where = f"{machine(run.machine)}, {run.bench['threads']} threads"
    asked = sorted({task["n"] for column in run.columns for task in column.tasks.values() if "n" in task})
    questions = (
        f"; zero-shot on {', '.join(f'{count:g}' for count in asked)} questions each, too few to rank by"
        if asked
        else ""
    )
    return (
        f"{verdict(run)}\n\n{table(['', *summary.columns], rows)}\n\n"
        f"Perplexity: {curve}. Asked “{run.generations[0].prompt}”:\n\n{said}\n\n"
        f"({where}; {'; '.join(note for note in run.notes if 'demo took' in note)}{questions}.)"
    )


DENSE = {
    "torch": "dense, `F.linear`",
    "onednn": "dense, oneDNN's own weight order",
    "decode": "dense, Pumice's kernel for few rows",
}
"""Backend of the dense layer -> what a table calls it."""


def speed() -> str:
    """One layer at a few row counts, each case at its best backend, beside the best dense."""
    results = read("matvec.json")
    rows_of = sorted({line["rows"] for line in results["results"]})
    threads = sorted({line["threads"] for line in results["results"]})
    lines = {(line["case"], (line["threads"], line["rows"])): line for line in results["results"]}
    columns = [(thread, count) for thread in threads for count in rows_of]
    best = {column: min(lines["dense", column]["ms"].values()) for column in columns}
    rows = [["fastest dense", *(f"{ms:.2f} ms" for ms in best.values())]]
    for backend, called in DENSE.items():
        times = [(ms, lines["dense", column]["ms"].get(backend)) for column, ms in best.items()]
        rows.append([called, *(f"{ms / own:.2f}×" if own else "" for ms, own in times)])
    for name in dict.fromkeys(line["case"] for line in results["results"] if line["case"] != "dense"):
        rows.append([name, *(f"{lines[name, column]['speedup']:.2f}×" for column in columns)])
    head = [f"{t} thread{'s' if t > 1 else ''}, {r} row{'s' if r > 1 else ''}" for t in threads for r in rows_of]
    cost = results["call_overhead_us"]
    stamp = results["machine"]
    return (
        f"{table(['4096 × 4096, bf16, weights cold', *head], rows)}\n\n"
        f"Against the fastest dense of the three; each case was timed in turns with them (`benchmarks/matvec.py`; {stamp['cpu']}, "
        f"{stamp['kernels_in_use']}). A sparse layer's call costs {cost['2-D: layer beyond kernel']} µs beyond its kernel for "
        f"2-D inputs and {cost['3-D: layer beyond kernel']} µs for 3-D ones; a whole call of a tiny `nn.Linear` costs "
        f"{cost['nn.Linear call']} µs."
    )


def methods() -> str:
    """Everything registered, with what it needs and where it comes from; what nowhere beats the simpler method says so."""
    from pumice.core import registry

    found = registry.methods()
    said = {(info.family, info.name): info.extras.get("simpler") for info in found}
    remarks = earned.remarks(
        lambda name: read(name) if (RESULTS / name).exists() else None, lambda *method: said.get(method)
    )
    rows = []
    for info in found:
        options = ", ".join(f"`{name}={option.default}`" for name, option in info.options.items())
        what = " ".join(filter(None, (info.summary, remarks.get((info.family, info.name)))))
        rows.append([info.family, f"`{info.name}`", what, info.paper or "", ", ".join(info.needs), options])
    return table(["family", "name", "what it does", "paper", "needs", "options"], rows)


def repairs(results: dict[str, Any]) -> str:
    """A table per model: every repair beside the model that it started from."""
    parts = []
    for model, name in NAMES.items():
        if model not in results:
            continue
        rows = []
        for key, entry in results[model].items():
            held = [number(value) for value in entry["held_out"]] if "held_out" in entry else ["", ""]
            undone = " (undone)" if entry.get("kept") is False else ""
            rows.append([f"{key}{undone}", number(entry["perplexity"]), *held, f"{entry.get('seconds', 0):,.0f}"])
        dense = number(results[model]["dense"]["perplexity"])
        head = [f"{name}, dense {dense}", "perplexity", "held-out loss before", "after", "seconds"]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def shrunk(results: dict[str, Any]) -> str:
    """A table per model: every structured method, its size, quality and decode speed."""
    parts = []
    for model, name in NAMES.items():
        if model not in results:
            continue
        dense = results[model]["dense"]
        rows = []
        for key, entry in results[model].items():
            if key == "dense" or "refused" in entry:
                continue
            speed = entry.get("decode", {}).get("speedup")
            rows.append(
                [
                    key,
                    f"{entry['density']:.3f}",
                    number(entry["perplexity"]),
                    f"{speed:.2f}×" if speed else "",
                    f"{entry['seconds']:,.0f}",
                ]
            )
        rows.sort(key=lambda row: float(row[2].replace(",", "")))
        head = [f"{name}, dense {number(dense['perplexity'])}", "of the blocks left", "perplexity", "decode", "seconds"]
        parts.append(table(head, rows))
    encoder = results.get("minilm", {})
    if encoder:
        found = [(key, row) for key, row in encoder.items() if key != "dense" and "refused" not in row]
        found.sort(key=lambda one: -one[1]["ndcg@10"])
        cells = [
            [key, f"{row['density']:.3f}", f"{row['ndcg@10']:.3f}", f"{row['seconds']:,.0f}"] for key, row in found
        ]
        head = [f"{ENCODER}, dense {encoder['dense']['ndcg@10']:.3f}", "of the blocks left", "nDCG@10", "seconds"]
        parts.append(table(head, cells))
    return "\n\n".join(parts)


SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "demo": demo,
        "quality": both_qualities,
        "speed": speed,
        "decode": measured("decode.json", sections.decoding),
    },
    "docs/methods.md": {"methods": methods},
    "docs/quality.md": {
        "quality": everything,
        "other": measured("prune_quality_other.json", sections.other),
        "armor": measured("armor.json", sections.armor),
        "chita": measured("chita.json", sections.chita),
        "larger": measured("larger_than_memory.json", sections.larger),
    },
    "docs/quantised.md": {
        "quantised": measured("quant_sparse.json", sections.quantised),
        "quantised speed": measured("quant_sparse.json", sections.quantised_speed),
        "int8 rows": measured("int8_rows.json", sections_kernels.int8_rows),
    },
    "docs/moe.md": {
        "moe layer": measured("moe_layer.json", sections.experts),
        "moe compare": measured("moe_compare.json", sections.compared),
    },
    "docs/peers.md": {
        f"peers {part}": measured("peers.json", lambda results, part=part: sections.peers(results, part))
        for part in ("mlp", "resnet", "int4", "decode", "decode-1.2b")
    },
    "docs/repair.md": {"repairs": measured("repair_quality.json", repairs)},
    "docs/roofline.md": {
        "roofline": measured("roofline.json", sections_kernels.roofline),
        "convolutions": measured("convolution.json", sections_kernels.convolutions),
    },
    "docs/shrink.md": {
        "shrink": measured("shrink_quality.json", shrunk),
        "scratch": measured("scratch.json", sections.scratch),
    },
}


def rewritten(text: str, made: dict[str, Callable[[], str]]) -> str:
    """A page with everything between its markers made anew; a marker that is missing ends the program."""
    for name, make in made.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        body = make()
        inside = f"{body}\n" if body else ""
        text, count = pattern.subn(lambda match, inside=inside: f"{match[1]}{inside}{match[2]}", text)
        if count != 1:
            raise SystemExit(f"there must be one <!-- {name} --> with its end, and there are {count}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail where something is out of date")
    check = parser.parse_args().check
    stale = []
    for file, made in SECTIONS.items():
        path = ROOT / file
        before = path.read_text()
        text = rewritten(before, made)
        if text != before:
            stale.append(file)
            if not check:
                path.write_text(text)
    for file in stale:
        print(f"{file}: {'out of date, run python benchmarks/tables.py' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
