"""Tables of single layers: what share of its roof each layout reaches, and convolutions one by one."""

from __future__ import annotations

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
    """Milliseconds of each shape, in brackets how many times as fast as dense; and what a nonzero costs."""
    runs = results["runs"]
    names = {"float32": "fp32", "bfloat16": "bf16"}
    columns = [f"{names[run['dtype']]}, {run['threads']} thread{'s' if run['threads'] > 1 else ''}" for run in runs]
    body = []
    for rows in zip(*(run["layers"] for run in runs), strict=True):
        channels, outputs, kernel, stride, size = rows[0]["shape"]
        name = f"{channels} to {outputs}, {kernel}x{kernel}{f' / {stride}' if stride > 1 else ''}, {size}x{size}"
        cells = [f"{row['ms']:.3f} ({row['dense_ms'] / row['ms']:.1f}×)" for row in rows]
        body.append([name, str(rows[0]["count"]), *cells])
    sums = [[sum(row["count"] * row[key] for row in run["layers"]) for key in ("ms", "dense_ms")] for run in runs]
    body.append(["all of the network", "", *(f"{sparse:.1f} ({dense / sparse:.1f}×)" for sparse, dense in sums)])
    cost = results["nonzero"]
    said = (
        f"In fp32, with one thread, a nonzero of a 3x3 convolution (256 channels, 14x14) takes {cost['ns']:.1f} ns for the "
        f"{cost['registers']} registers of sixteen places that it meets, {cost['least_ns']:.1f} at the rate of a dense fp32 "
        f"product in the same turns ({cost['product_gflops']:.0f} GFLOP/s). Of the {cost['us_at_10_percent']:.0f} µs that the "
        f"layer takes with 90 % zeros, {cost['rest_us']:.0f} do not depend on how many nonzeros there are: laying out x, and "
        "loading and storing sums."
    )
    head = [f"ms with {1 - results['density']:.0%} zeros (× dense)", "count", *columns]
    return f"{table(head, body)}\n\n{said} ({machine(results['machine'])}.)"
