"""Tables of the smaller benchmarks: each function makes one results file into markdown."""

from __future__ import annotations

from typing import Any

import moe_rows
from shown import ENCODER, TITLES, machine, number, seconds, table

from pumice.moe.recipes import recipes

Results = dict[str, Any]


def other(results: Results) -> str:
    """MiniLM and EfficientNet after one-shot pruning, a table per model and sparsity, best first."""
    parts = []
    for model, name, first, columns in (
        ("minilm-l6", ENCODER, "ndcg@10", {"ndcg@10": "nDCG@10", "cosine": "cosine to dense"}),
        ("efficientnet-lite0", "EfficientNet-Lite0", "top1_agreement", {"top1_agreement": "same class", "kl": "KL"}),
    ):
        rows = results.get(model, {})
        kinds: dict[str, list[tuple[str, Results]]] = {}
        for key, entry in rows.items():
            method, _, kind = key.partition(" @ ")
            if kind and "refused" not in entry:
                kinds.setdefault(kind, []).append((method, entry))
        dense = f", dense {rows['dense'][first]:.3f}" if "dense" in rows else ""
        for kind, found in kinds.items():
            found.sort(key=lambda one: -one[1][first])
            cells = [[method, *(f"{entry[key]:.3f}" for key in columns), seconds(entry)] for method, entry in found]
            head = [f"{name}{dense}", *columns.values(), "seconds"]
            parts.append(f"## {name}, {TITLES.get(kind, kind)}\n\n{table(head, cells)}")
    if not parts:
        return ""
    said = (
        "MiniLM ranks the Cranfield collection; EfficientNet, whose own images are not at hand, is compared with its dense "
        "self on enlarged CIFAR-10 pictures: that ranks methods and predicts no accuracy (`benchmarks/prune_quality_other.py`)."
    )
    return f"{said}\n\n" + "\n\n".join(parts)


def armor(results: Results) -> str:
    """ARMOR beside plain N:M: perplexity by bytes, and milliseconds by layer."""
    parts = []
    if "quality" in results:
        found = sorted(results["quality"]["rows"], key=lambda row: row["bits"])
        rows = [
            [row["method"], row.get("pattern", ""), f"{row['bits']:.2f}", number(row["perplexity"]), seconds(row)]
            for row in found
        ]
        head = ["stories15M", "pattern", "bits a weight", "perplexity", "seconds"]
        parts.append(table(head, rows))
    if "time" in results:
        times = results["time"]["rows"]
        forms = list(dict.fromkeys(row["form"] for row in times if not row["form"].startswith("armor")))
        rows = []
        for shape, count, wrapped in dict.fromkeys(
            (row["layer"], row["rows"], row["form"]) for row in times if row["form"].startswith("armor")
        ):
            # Each armor row was timed in turns with the plain forms in front of it.
            at = next(
                i for i, row in enumerate(times) if (row["layer"], row["rows"], row["form"]) == (shape, count, wrapped)
            )
            near = {row["form"]: row["ms"] for row in times[at - len(forms) : at]}
            cells = [f"{near[form]:.2f}" for form in forms]
            rows.append([f"{shape}, {count} rows", *cells, f"{times[at]['ms']:.2f} ({wrapped.partition(', ')[2]})"])
        head = ["ms for one call, bf16, weights cold", *forms, "armor 2:4"]
        parts.append(f"{table(head, rows)}\n\n({machine(results['time']['machine'])}.)")
    if not parts:
        return ""
    return "## ARMOR beside plain N:M at equal bytes\n\n" + "\n\n".join(parts)


def chita(results: Results) -> str:
    """CHITA layer by layer, jointly and in stages, with peak memory."""
    rows = [
        [
            f"{row['method']}, {1 - row['density']:.0%} zeros",
            number(row["perplexity"]),
            f"{row['gradients_bytes'] / 1e9:.2f}" if row["gradients_bytes"] else "",
            f"{row['peak_memory_bytes'] / 1e9:.1f}",
            seconds(row),
        ]
        for row in results["rows"]
    ]
    weights = max(row["weights"] for row in results["rows"])
    head = ["stories15M", "perplexity", "gradients GB", "peak GB", "seconds"]
    return (
        f"## CHITA on {weights / 1e6:.1f} million weights\n\nThe Hessian of these weights would take "
        f"{weights**2 * 4 / 1e12:,.0f} TB and is never formed; each row ran in a process of its own.\n\n{table(head, rows)}"
    )


def scratch(results: Results) -> str:
    """Inherited weights beside the same architecture trained from scratch."""
    settings = results["settings"]
    rows = [
        [
            label,
            f"{row['accuracy']:.1%}",
            f"{row['parameters']:,.0f}",
            f"{row['multiplications'] / 1e6:.1f}",
            f"{row['epochs']:.1f}",
        ]
        for label, row in results["rows"].items()
    ]
    head = ["small residual network, CIFAR-10 subset", "accuracy", "parameters", "million multiplications", "epochs"]
    return (
        f"Means over {settings['seeds']} seeds, {settings['density']:.0%} of the parameters inside the blocks left "
        f"(`benchmarks/scratch.py`):\n\n{table(head, rows)}"
    )


def quantised(results: Results) -> str:
    """Quality by stored bits, GQSA's stages among the rows."""
    parts = []
    for model, name, columns in (
        ("stories15m", "stories15M, 96 windows", {"perplexity": "perplexity"}),
        ("minilm", ENCODER, {"ndcg@10": "nDCG@10", "cosine": "cosine to dense"}),
    ):
        found = results.get(model, {})
        if len(found) < 2:
            continue
        first = next(iter(columns))
        show = number if first == "perplexity" else "{:.3f}".format
        rows = [
            [
                label,
                f"{entry['bits_per_weight']:.2f}" if "bits_per_weight" in entry else "not stored",
                *(show(entry[key]) for key in columns),
                seconds(entry),
            ]
            for label, entry in sorted(found.items(), key=lambda one: one[0].startswith("gqsa"))
            if label != "dense"
        ]
        dense = f", dense {show(found['dense'][first])}" if "dense" in found else ""
        parts.append(table([f"{name}{dense}", "bits a weight", *columns.values(), "seconds"], rows))
    return "\n\n".join(parts)


def quantised_speed(results: Results) -> str:
    """One layer in every layout beside the best dense bfloat16."""
    if "speed" not in results:
        return ""
    speed = results["speed"]
    by: dict[str, dict[int, Results]] = {}
    for row in speed["rows"]:
        fastest = by.setdefault(row["case"], {}).setdefault(row["threads"], row)
        if row["ms"] < fastest["ms"]:
            by[row["case"]][row["threads"]] = row
    threads = sorted({row["threads"] for row in speed["rows"]})
    rows = []
    for case, found in by.items():
        bits = next(iter(found.values())).get("bits_per_weight")
        cells = [
            f"{found[t]['ms']:.2f} ({found[t]['of_best_dense']:.1f}×, {found[t]['backend']})" if t in found else ""
            for t in threads
        ]
        rows.append([case, "" if bits is None else f"{bits:.2f}", *cells])
    head = [f"ms, {t} thread{'s' if t > 1 else ''} (against the best dense)" for t in threads]
    size = speed["size"]
    return (
        f"{table([f'{size} × {size}, one row, weights cold', 'bits a weight', *head], rows)}\n\n"
        f"({machine(speed['machine'])}; of several backends the fastest is shown.)"
    )


def larger(results: Results) -> str:
    """A model that does not fit the memory it is given, pruned from disk to disk."""
    rows = []
    for run in results["runs"]:
        how = "from disk to disk" if run["streamed"] else "loaded first"
        disk = f"{run['disk_bytes'] / 1e9:.2f}" if "disk_bytes" in run else ""
        peaks = [
            f"{run[key] / 1e9:.2f}" if run.get(key) else "" for key in ("peak_private_bytes", "peak_resident_bytes")
        ]
        rows.append([f"{run['method']}, {how}", run["outcome"], *peaks, disk, seconds(run)])
    size, limit = results["model"]["bytes"] / 1e9, results["limit_private_bytes"] / 1e9
    head = [
        f"{size:.1f} GB of weights, {limit:.1f} GB allowed",
        "outcome",
        "private GB",
        "resident GB",
        "disk GB",
        "seconds",
    ]
    return (
        "## A model larger than the memory\n\nResident memory counts pages of the checkpoint's files, which the system may "
        f"take back; the kernel limits the private part (`benchmarks/larger_than_memory.py`).\n\n{table(head, rows)}"
    )


def experts(results: Results) -> str:
    """One MoE layer: ours beside Transformers' implementations and a dense MLP of the same active FLOPs, in ms."""
    rows = []
    for entry in sorted(results["results"], key=lambda one: (one["layer"], one["dtype"], "train" in one["part"])):
        times = {name: time["ms"] for name, time in entry["times"].items()}
        ours, dense = times.pop("pumice"), times.pop("dense MLP", None)
        best = min((name for name in times if not name.startswith("loop")), key=times.__getitem__)
        what = "64 experts, 8 a token" if entry["layer"] == "fine" else "8 experts, 2 a token"
        what += ", with gradients" if "train" in entry["part"] else ""
        floor = f"{number(entry['floor_ms'])} ({entry['floor_by']})"
        shown = [what, entry["dtype"], f"{entry['tokens']}", number(ours), f"{number(times[best])} ({best})"]
        ratios = [f"{times[best] / ms:.2f}×" for ms in (ours, entry["floor_ms"])]
        rows.append([*shown, ratios[0], number(dense), floor, ratios[1]])
    head = ["layer", "weights", "tokens", "ours, ms", "best other, ms", "ours is"]
    head += ["dense MLP, ms", "floor, ms", "floor is"]
    stamp = results["results"][0]["machine"]
    said = f"{machine(stamp)}, {stamp['threads']} threads; weights from memory. The floor is the longer of two times: to read the "
    said += (
        "weights in use, and to multiply at the rate of a large dense product of PyTorch's, both measured in the same run; the last "
        "column is how many times as fast as the best other implementation that would be."
    )
    loops = [entry for entry in results["results"] if "loop" in entry["times"]]
    for entry in sorted(loops, key=lambda one: one["dtype"]):
        times = {name: time["ms"] for name, time in entry["times"].items()}
        ours, plain, lean = (times[name] for name in ("pumice", "loop", "loop in our operators"))
        said += (
            f" With gradients in {entry['dtype']}, a loop over the experts in plain PyTorch takes {number(plain)} ms, which is "
            f"{plain / ours:.2f} times ours; inside our operators, whose backward pass needs less, {number(lean)} ms "
            f"({lean / ours:.2f})."
        )
    return f"{table(head, rows)}\n\n{said}"


def compared(results: Results) -> str:
    """All MoE recipes trained on the same text: loss, use of the experts and speed, best first, dense among them."""
    rows = moe_rows.fared(results)
    if not rows:
        return ""
    seeds, lines = max(len(row.losses) for row in rows.values()), []
    for row in rows.values():
        mean, dense, found = row.mean, "recipe" not in row.entry, moe_rows.verdict(row, rows)
        beside = moe_rows.BASES.get(row.name, "") if found is None else found.words
        said = "; ".join(filter(None, (row.entry.get("note"), "" if row.causal else "not causal")))
        used = ["", "", ""] if dense else [f"{mean['experts_per_token']:.1f}", f"{mean['load_cv']:.2f}", ""]
        if not dense:
            used[2] = f"{mean['drop_rate']:.1%}" if mean["drop_rate"] else "0"
        trains = abs(mean["active_training"] / mean["active"] - 1) > moe_rows.SLACK
        met = (mean["active"], mean["active_training"]) if trains else (mean["active"],)
        lines.append(
            [
                row.name if dense else f"`{row.name}`",
                *(f"{loss:.3f}" for loss in (row.loss, *row.losses)),
                *[""] * (seeds - len(row.losses)),
                beside,
                "; ".join(f"{active / 1e3:.0f}" for active in met),
                f"{mean['total'] / 1e3:,.0f}",
                *used,
                f"{mean['speed']:.2f}×",
                said,
            ]
        )
    head = ["row", "loss", *(f"seed {seed}" for seed in range(seeds)), "beside linear top-2", "active, thousand"]
    head += ["all, thousand", "experts a token", "load CV", "dropped", "training speed", "remark"]
    refused = [
        f"`{name}`: {next(iter(entry['seeds'].values()))['refused']}"
        for name, entry in results["rows"].items()
        if name not in rows and entry["seeds"]
    ]
    missing = [f"`{recipe.name}`" for recipe in recipes() if recipe.name not in results["rows"]]
    steps = next(iter(rows.values())).entry["steps"]
    said = (
        f"{steps} steps, loss in nats a token on text that was kept back; parameters are those of one feed-forward block, "
        "a second number of active ones is the mean while it was trained. "
        f"Training speed is that of the dense model of equal active parameters in the same process ({machine(results['machine'])}, "
        "one thread). A router is better where it is in every seed, against linear top-2 token choice of the same form of "
        "experts."
    )
    rest = [f"Not trained: {'; '.join(refused)}"] if refused else []
    rest += [f"Not measured yet: {', '.join(missing)}."] if missing else []
    return "\n\n".join([table(head, lines), said, *rest])


def decoding(results: Results) -> str:
    """Milliseconds a token of whole models, dense and sparse, a table a model and thread count."""
    parts = []
    for name, found in results.items():
        if name == "protocol":
            continue
        measured = {label: row for label, row in found["rows"].items() if "ms" in row}
        rows = [
            [
                label,
                f"{row['ms']:.1f}",
                f"{row['over']:.2f}×",
                f"{row['over_control']:.2f}×" if row["over_control"] else "–",
                f"{row['bytes'] / 1e6:,.0f}",
                ", ".join(f"{count} {layout}" for layout, count in row["layouts"].items()),
            ]
            for label, row in sorted(measured.items(), key=lambda one: -one[1]["ms"])
        ]
        parts.append(
            table(
                [
                    name,
                    "ms a token",
                    "over PyTorch's best bf16",
                    "over `dense bf16`",
                    "MB in memory",
                    "layers by layout",
                ],
                rows,
            )
        )
        if absent := [f"{label} ({row['missing']})" for label, row in found["rows"].items() if "missing" in row]:
            parts.append(f"Not measured: {', '.join(absent)}.")
        parts.append(f"({machine(found['machine'])}.)")
    return "\n\n".join(parts)


OURS = "Pumice"


def _cell(row: Results, key: str = "ms") -> str:
    """A time; with a star where other programs ran meanwhile; nothing where there is none."""
    if key not in row:
        return ""
    text = f"{row[key]:.2f}" if row[key] < 10 else f"{row[key]:.1f}"
    return f"{text}*" if "disturbed" in row else text


def _beaten(columns: dict[str, Results], without: str | None = None) -> str:
    """For each column the fastest other engine, and everything of ours that is slower than it.

    Rows with `without` in their names are left out of account.
    """
    lines = []
    for label, rows in columns.items():
        times = {name: row["ms"] for name, row in rows.items() if "ms" in row and (not without or without not in name)}
        others = {name: ms for name, ms in times.items() if not name.startswith(OURS)}
        if not others or len(others) == len(times):
            continue
        best = min(others, key=lambda name: others[name])
        slower = [
            f"{name.removeprefix(OURS).strip()} ({times[name] / others[best]:.2f}×)"
            for name in times
            if name.startswith(OURS) and times[name] > others[best]
        ]
        what = f"slower than it: {'; '.join(slower)}" if slower else "everything of ours is faster"
        lines.append(f"- {label}: the fastest other is {best}, {_cell(rows[best])} ms; {what}.")
    return "\n".join(lines)


def peers(results: Results, part: str) -> str:
    """One part of the comparison with other engines: a row each, a column for each thread count (and row count)."""
    columns = {
        label.removeprefix(f"{part}, "): found for label, found in results.items() if label.startswith(f"{part}, ")
    }
    if not columns:
        return ""
    tables = {label: found["rows"] for label, found in columns.items()}
    names = list(dict.fromkeys(name for rows in tables.values() for name in rows))
    body, missing = [], []
    for name in names:
        found = [rows.get(name, {}) for rows in tables.values()]
        timed = [row for row in found if "ms" in row]
        if not timed:
            missing.append(f"{name} ({next(row['missing'] for row in found if 'missing' in row)})")
            continue
        cells = [_cell(row) for row in found]
        if part.startswith("decode"):
            cells = [f"{cell} ({1e3 / row['ms']:.0f})" if cell else "" for cell, row in zip(cells, found, strict=True)]
        last = timed[-1]
        ran = "; ".join(dict.fromkeys(row["ran"] for row in timed if "ran" in row))
        if "relative_error" in last:
            cells.append(f"{last['relative_error']:.1e}")
        if part != "mlp":
            cells.append(f"{last['bytes'] / 1e6:.1f}" if "bytes" in last else "")
        body.append([name, *cells, ran])
    what = {
        "mlp": "ms for the network",
        "resnet": "ms for the network",
        "int4": "ms for the product",
    }.get(part, "ms a token (tokens a second)")
    head = [
        what,
        *columns,
        *([] if part.startswith("decode") else ["error"]),
        *(["MB"] if part != "mlp" else []),
        "ran as",
    ]
    parts = [table(head, body)]
    if part == "mlp" and any("int8" in name for name in names):
        parts += ["Among rows in bf16 and float32:", _beaten(tables, "int8"), "Among all, int8 too:"]
    parts.append(_beaten(tables))
    if missing:
        parts.append(f"Not measured: {'; '.join(missing)}.")
    if any("disturbed" in row for rows in tables.values() for row in rows.values()):
        parts.append("\\* Other programs took more than 5 % of the cores meanwhile.")
    parts.append(f"({machine(next(iter(columns.values()))['machine'])}.)")
    return "\n\n".join(filter(None, parts))
