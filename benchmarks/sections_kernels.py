"""Tables of single layers: what share of its roof each layout reaches, and convolutions one by one."""

from __future__ import annotations

from collections import Counter
from typing import Any

from shown import machine, table

Results = dict[str, Any]


def roofline(results: Results) -> str:
    """What share of its roof each layout reaches, by threads and rows."""
    runs = results["runs"]
    columns = {
        f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}, {rows} row{'s' if rows > 1 else ''}": {
            point["case"]: point for point in run["points"] if point["rows"] == rows
        }
        for run in runs
        for rows in sorted({point["rows"] for point in run["points"]})
    }
    cases = list(dict.fromkeys(case for found in columns.values() for case in found))
    body = [
        [case, *(f"{found[case]['of_roof']:.0%}" if case in found else "" for found in columns.values())]
        for case in cases
    ]
    said = "; ".join(
        f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}: {run['ceilings']['bytes'] / 1e9:.0f} GB/s and "
        f"{run['ceilings']['flops'] / 1e9:.0f} GFLOP/s"
        for run in runs
    )
    return f"{table(['share of its roof', *columns], body)}\n\nCeilings, medians of the turns: {said}. ({machine(results['machine'])}.)"


def convolutions(results: Results) -> str:
    """Milliseconds of each shape, at random and in groups, in brackets how many times as fast as dense; and what a nonzero costs."""

    def cell(ms: float, groups: float, dense: float, digits: int) -> str:
        return f"{ms:.{digits}f} ({dense / ms:.1f}×), {groups:.{digits}f} ({dense / groups:.1f}×)"

    runs = results["runs"]
    names = {"float32": "fp32", "bfloat16": "bf16"}
    columns = [f"{names[run['dtype']]}, {run['threads']} thread{'s' if run['threads'] > 1 else ''}" for run in runs]
    body = []
    for rows in zip(*(run["layers"] for run in runs), strict=True):
        channels, outputs, kernel, stride, size = rows[0]["shape"]
        name = f"{channels} to {outputs}, {kernel}x{kernel}{f' / {stride}' if stride > 1 else ''}, {size}x{size}"
        cells = [cell(row["ms"], row["groups_ms"], row["dense_ms"], 3) for row in rows]
        body.append([name, str(rows[0]["count"]), *cells])
    keys = ("ms", "groups_ms", "dense_ms")
    sums = [[sum(row["count"] * row[key] for row in run["layers"]) for key in keys] for run in runs]
    body.append(["all of the network", "", *(cell(ms, groups, dense, 1) for ms, groups, dense in sums)])
    cost = results["nonzero"]
    said = (
        f"In fp32, with one thread, a nonzero of a 3x3 convolution (256 channels, 14x14) takes {cost['ns']:.1f} ns for the "
        f"{cost['registers']} registers of sixteen places that it meets, {cost['least_ns']:.1f} at the rate of a dense fp32 "
        f"product in the same turns ({cost['product_gflops']:.0f} GFLOP/s). Of the {cost['us_at_10_percent']:.0f} µs that the "
        f"layer takes with 90 % zeros, {cost['rest_us']:.0f} do not depend on how many nonzeros there are: laying out x, and "
        "loading and storing sums."
    )
    chosen = Counter(row["dense"] for run in runs for row in run["layers"])
    said += (
        " The fastest dense way was " + ", ".join(f"{name} for {n}" for name, n in chosen.most_common()) + " of these."
    )
    head = [f"ms with {1 - results['density']:.0%} zeros (× dense): at random, 16x1", "count", *columns]
    return f"{table(head, body)}\n\n{said} ({machine(results['machine'])}.)"


def int8_rows(results: Results) -> str:
    """A layer of int8 with many rows beside dense int8 and dense bf16, and a model's quality and prompt."""
    found = results["layer"]
    control = ("int8, dense, PyTorch", "bf16, dense")
    columns: dict[str, dict[str, Results]] = {}
    for run in found["runs"]:
        best: dict[str, Results] = {}
        for way in run["ways"]:
            name = way["case"] if way["case"] in control else f"{way['case']}: {way['backend']}"
            if name not in best or way["ms"] < best[name]["ms"]:
                best[name] = way
        columns[f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}, {run['rows']} rows"] = best
    names = list(dict.fromkeys(name for best in columns.values() for name in best))
    names.sort(key=lambda name: name not in control)
    body = []
    for name in names:
        ways = [best.get(name) for best in columns.values()]
        cells = [
            f"{way['ms']:.2f} ({way[f'of {control[0]}']:.2f}×, {way[f'of {control[1]}']:.2f}×)" if way else ""
            for way in ways
        ]
        error = next((way["error"] for way in ways if way and "error" in way), None)
        body.append([name, *cells, "" if error is None else f"{error:.1e}"])
    size = found["size"]
    rows = [
        [row["model"], f"{row['perplexity']:.2f}", f"{row['prompt_ms']:.0f}", ", ".join(row["backends"])]
        for row in results["model"]["rows"]
    ]
    return (
        f"{table(['ms (× PyTorch int8, × best dense bf16)', *columns, 'error'], body)}\n\n"
        f"One layer of {size} × {size} ({machine(found['machine'])}).\n\n"
        f"{table(['SmolLM2-135M', 'perplexity', 'ms of a prompt of 256 tokens', 'kernels'], rows)}"
    )
