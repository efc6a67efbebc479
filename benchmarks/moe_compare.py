"""Every MoE recipe trained on the same text at equal active parameters, with dense models beside it.

A small Llama-shaped language model (4 blocks, width 128, byte-pair vocabulary of 1024 trained on the text) learns from
nine tenths of TinyStories and Shakespeare and is judged on the rest: cross-entropy in nats a token. Every row has the
same attention, data, order, steps and learning rate. Its feed-forward blocks are made so that a token meets as many
parameters as in a SwiGLU block of hidden width 256, and hold about four times as many in total ("dense, equal active"
and "dense, equal total" are those), unless the recipe says how many experts there are. Where a method decides itself
how many experts a token gets, `active` says what came of it on the text of judgement (routers included; a parameter
met twice counts twice). Rows that are not causal see a token's future, which is tried out, so that their loss is no
language model's. `speed` is that of "dense, equal active", a step of which is timed in turns with the row's training,
over the row's: of CPU seconds of one thread, so that other work on the machine counts little.

    python benchmarks/moe_compare.py --shared ../shared                       # what is not in the results yet
    python benchmarks/moe_compare.py --shared ../shared --match switch --seeds 0 1

Several processes may run at once on different rows or seeds.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moe_models import LENGTH, SOURCES, VOCABULARY, Row, active, build, count_words, rows, total
from torch import Tensor, nn

from pumice import moe
from pumice.analyze.experts import KINDS, inspect_experts
from pumice.core.errors import PumiceError
from pumice.core.progress import bar
from pumice.kernels.features import machine_stamp
from pumice.moe import RouteContext

RESULTS = Path(__file__).parent / "results" / "moe_compare.json"
LOADS = Path(__file__).parent / "results" / "moe_compare_loads.json"
"""For plots: the load of one block over time, and the tokens of each kind that its experts got."""
BATCH, RATE, POINTS, REFERENCES = 8, 2e-3, 16, 12
SHOWN_EXPERTS = 16
STATISTICS = ("load_cv", "load_max", "drop_rate", "entropy", "unused")


@dataclass
class Text:
    """Token ids to learn from and to be judged by, and where the second text begins in the first."""

    tokenizer: Any
    learn: Tensor
    second: int
    judge_NL: Tensor


def read(shared: Path) -> Text:
    """Both texts, cut nine to one, and the tokenizer of the nine tenths."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    parts: list[tuple[str, str]] = []
    for name in ("tinystories_sample.txt", "tinyshakespeare.txt"):
        text = (shared / "data" / "lm_text" / name).read_text(encoding="utf-8")
        cut = len(text) * 9 // 10
        parts.append((text[:cut], text[cut:]))
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator([first for first, _ in parts], trainer)
    learn, judge = ([torch.tensor(inner.encode(part[side]).ids) for part in parts] for side in (0, 1))
    windows = torch.cat([ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH) for ids in judge])
    # Evenly spaced, so that both texts count.
    picked = windows[:: max(1, len(windows) // 128)][:128]
    return Text(PreTrainedTokenizerFast(tokenizer_object=inner), torch.cat(learn), len(learn[0]), picked)


class Trainer:
    """One model and what makes a step of its training."""

    def __init__(self, row: Row, text: Text, seed: int, steps: int) -> None:
        self.row, self.text, self.steps = row, text, steps
        self.model = build(row, seed).train()
        count_words(self.model, text.learn)
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=RATE, betas=(0.9, 0.95), fused=True)
        # Two, so that a router's noise does not change what the model reads.
        self.order, self.noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Windows [B, L] from anywhere, and the text that each is from."""
        place_B = torch.randint(len(self.text.learn) - LENGTH, (BATCH,), generator=self.order)
        ids_BL = torch.stack([self.text.learn[i : i + LENGTH] for i in place_B.tolist()])
        return ids_BL, (place_B >= self.text.second).long()

    def step(self, step: int, ids_BL: Tensor, source_B: Tensor) -> float:
        """The loss before the step; PumiceError where it is not finite."""
        for group in self.optimizer.param_groups:
            warm = (step + 1) / (0.05 * self.steps + 1)
            group["lr"] = RATE * min(warm, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))
        modality_T = source_B.repeat_interleave(LENGTH)
        context = RouteContext(
            token_ids_T=ids_BL,
            modality_T=modality_T,
            labels_G=source_B % SOURCES,
            progress=step / self.steps,
            generator=self.noise,
        )
        with context.active():
            loss = self.model(input_ids=ids_BL, labels=ids_BL).loss
            if not torch.isfinite(loss):
                raise PumiceError(f"{self.row.name}: the loss became {float(loss)} at step {step}.")
            (loss + moe.aux_loss(self.model)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def timed(call: Callable[[], float]) -> tuple[float, float]:
    """What a call returns, and its CPU seconds."""
    start = time.process_time()
    return call(), time.process_time() - start


def train(row: Row, text: Text, steps: int, seed: int) -> tuple[Trainer, dict[str, Any], list[list[float]]]:
    """A trained model, its facts, and the shares of the load of one block over time."""
    trainer, dense = Trainer(row, text, seed, steps), Trainer(rows()[0], text, seed, steps)
    losses, own, other, met, shares = [], [], [], [], []
    with bar(steps, f"{row.name}, seed {seed}") as shown:
        for step in range(steps):
            ids_BL, source_B = trainer.batch()
            loss, seconds = timed(lambda step=step, batch=(ids_BL, source_B): trainer.step(step, *batch))
            losses.append(loss)
            own.append(seconds)
            if step % max(1, steps // REFERENCES) == 0:
                other.append(timed(lambda step=step, batch=(ids_BL, source_B): dense.step(step, *batch))[1])
            if step % max(1, steps // POINTS) == 0 or step == steps - 1:
                met.append(active(trainer.model, BATCH * LENGTH)[0])
                shares += [[step, *load] for load in [share(trainer.model)] if load]
            shown.update(1)
    # The first step of each warms caches up.
    own_s, other_s = sum(own[1:]) / len(own[1:]), sum(other[1:]) / len(other[1:])
    tail = losses[-max(1, steps // 20) :]
    facts = {
        "train_loss": sum(tail) / len(tail),
        "active_training": sum(met) / len(met),
        "tokens_per_cpu_second": round(BATCH * LENGTH / own_s),
        "speed": other_s / own_s,
        "cpu_seconds": sum(own),
    }
    return trainer, facts, shares


def share(model: nn.Module) -> list[float]:
    """Each expert's share of the assignments in the last MoE layer; nothing where there are too many to be drawn."""
    found = [one.plan.load_E.double() for _, one in moe.layers(model) if one.plan is not None]
    if not found or len(found[-1]) > SHOWN_EXPERTS:
        return []
    return [round(float(one), 3) for one in found[-1] / found[-1].sum().clamp_min(1e-30)]


@torch.no_grad()
def judge(model: nn.Module, text: Text) -> dict[str, Any]:
    """Loss on the text that was kept back, and how the experts were used there."""
    model.eval()
    loss, count, seen, met, went = 0.0, 0, [], [], []
    for ids_BL in text.judge_NL.split(BATCH):
        with RouteContext(token_ids_T=ids_BL).active():
            loss += float(model(input_ids=ids_BL, labels=ids_BL).loss) * len(ids_BL)
        count += len(ids_BL)
        seen += [one for one in moe.statistics(model).values() if one]
        both = active(model, ids_BL.numel())
        met.append(both[0])
        went.append(both[1])
    found = {name: sum(one[name] for one in seen) / len(seen) for name in STATISTICS} if seen else {}
    used = {"experts_per_token": sum(went) / len(went)} if seen else {}
    return {"loss": loss / count, "active": sum(met) / len(met), "total": total(model), **used, **found}


@torch.no_grad()
def causal(model: nn.Module, text: Text) -> bool:
    """Whether the first half of a window's logits stays the same with another second half."""
    half, logits = LENGTH // 2, []
    first, last = text.judge_NL[0], text.judge_NL[-1]
    for ids_L in (first, torch.cat([first[:half], last[half:]])):
        with RouteContext(token_ids_T=ids_L[None]).active():
            logits.append(model(input_ids=ids_L[None]).logits[0, :half])
    return bool((logits[0] - logits[1]).abs().max() < 1e-3)


def kinds(trainer: Trainer, text: Text) -> dict[str, Any]:
    """How well the experts of each block tell kinds of tokens apart, and who got which in the last one."""
    ids = [{"input_ids": ids_BL} for ids_BL in text.judge_NL.split(BATCH)]
    try:
        found = [_inspected(trainer.model, one, text) for one in ids]
    except PumiceError:
        return {}
    last = [one.layers[-1] for one in found]
    out: dict[str, Any] = {}
    layers = list(zip(*(one.layers for one in found), strict=True))
    mean = 0.0
    for parts in layers:
        whole = parts[0]
        for part in parts[1:]:
            whole.count_NE += part.count_NE
        mean += whole.specialisation / len(layers)
    out["specialisation"] = mean
    if last[0].experts <= SHOWN_EXPERTS:
        out["by_kind"] = dict(zip(KINDS, last[0].count_NE.round().int().tolist(), strict=True))
    return out


def _inspected(model: nn.Module, batch: dict[str, Tensor], text: Text) -> Any:
    with RouteContext(token_ids_T=batch["input_ids"]).active():
        return inspect_experts(model, [batch], text.tokenizer, progress=False)


def measure(row: Row, text: Text, steps: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One row and seed: its facts, and what is drawn of it."""
    trainer, facts, shares = train(row, text, steps, seed)
    facts |= judge(trainer.model, text)
    drawn = kinds(trainer, text) if row.recipe is not None else {}
    if "specialisation" in drawn:
        facts["specialisation"] = drawn.pop("specialisation")
    facts = {key: round(value, 4) for key, value in facts.items()}
    return {**facts, "causal": causal(trainer.model, text)}, {**drawn, "load": shares}


def merge(path: Path, change: Callable[[dict[str, Any]], None], indent: int | None) -> None:
    """Change a results file that other processes change too."""
    path.parent.mkdir(exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        results = json.loads(path.read_text()) if path.exists() else {}
        change(results)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(results, indent=indent) + "\n")
        part.replace(path)
    finally:
        os.close(folder)


def keep(row: Row, steps: int, seed: int, facts: dict[str, Any], drawn: dict[str, Any]) -> None:
    """Write one row's seed into both files."""

    def change(results: dict[str, Any]) -> None:
        results |= {"protocol": __doc__, "machine": machine_stamp()}
        entry = results.setdefault("rows", {}).setdefault(row.name, {"seeds": {}})
        if row.recipe is not None:
            entry |= {"recipe": row.recipe.name, "arguments": row.arguments, "layer": row.recipe.layer}
        if row.note:
            entry["note"] = row.note
        entry["steps"] = steps
        entry["seeds"][str(seed)] = facts

    merge(RESULTS, change, 1)
    if seed == 0 and drawn.get("load"):
        merge(LOADS, lambda results: results.update({row.name: drawn}), None)


def done(name: str, steps: int, seed: int) -> bool:
    """Whether the results have this row's seed with as many steps."""
    rows = json.loads(RESULTS.read_text()).get("rows", {}) if RESULTS.exists() else {}
    entry = rows.get(name, {"seeds": {}})
    return entry.get("steps") == steps and "loss" in entry["seeds"].get(str(seed), {})


def main() -> None:
    global RESULTS, LOADS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/")
    parser.add_argument("--match", default="", help="rows whose name contains this")
    parser.add_argument("--skip", default="\n", help="but not those whose name contains this")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=RESULTS.parent, help="folder of the results")
    parser.add_argument("--redo", action="store_true", help="measure again what is in the results already")
    args = parser.parse_args()
    RESULTS, LOADS = args.out / RESULTS.name, args.out / LOADS.name
    torch.set_num_threads(1)
    text = read(args.shared)
    for seed in args.seeds:
        for row in rows():
            wanted = args.match in row.name and args.skip not in row.name
            if not wanted or (done(row.name, args.steps, seed) and not args.redo):
                continue
            try:
                facts, drawn = measure(row, text, args.steps, seed)
            except PumiceError as error:
                facts, drawn = {"refused": str(error)}, {}
            print(row.name, seed, facts, flush=True)
            keep(row, args.steps, seed, facts, drawn)


if __name__ == "__main__":
    main()
