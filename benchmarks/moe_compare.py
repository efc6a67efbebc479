"""Every MoE recipe trained on the same text at equal active parameters, with dense models beside it.

A small Llama-shaped language model (4 blocks, width 128, byte-pair vocabulary of 1024 trained on the text) learns from
nine tenths of TinyStories and Shakespeare and is judged on the rest: cross-entropy in nats a token. Every row has the
same attention, data, order, steps and learning rate; its feed-forward blocks hold as many active parameters a token as
a SwiGLU block of hidden width 256 and about four times as many in total ("dense, equal active" and "dense, equal total"
are those). A layer with k routed and s shared experts gets 4(k + s) - s experts, unless its recipe says how many.
`active` is measured on the evaluation text. Rows that are not causal see later tokens, so that their loss is no
language model's; it is listed and marked. Tokens a second are of training and of the machine as it was, beside others.

    python benchmarks/moe_compare.py --shared ../shared                       # what is not in the results yet
    python benchmarks/moe_compare.py --shared ../shared --match switch --steps 300 --seeds 2
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice import moe
from pumice.analyze.experts import inspect_experts, write
from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.core.progress import bar
from pumice.kernels.features import machine_stamp
from pumice.moe import MoE, RouteContext
from pumice.moe.recipes import Recipe, recipes

RESULTS = Path(__file__).parent / "results" / "moe_compare.json"
WIDTH, BLOCKS, ACTIVE, RATIO, VOCABULARY, LENGTH, BATCH = 128, 4, 256, 4, 1024, 128, 16
DENSE = {"dense, equal active": ACTIVE, "dense, equal total": ACTIVE * RATIO}
MATRICES = {"swiglu": 3, "heterogeneous": 3, "autonomous": 3}
"""Matrices of a kind of experts, 2 where it is not said: experts of two matrices are wider by half."""


@dataclass
class Text:
    """Token ids to learn from and to be judged by."""

    tokenizer: Any
    learn: Tensor
    judge_NL: Tensor


@dataclass
class Trained:
    """One model after its training."""

    model: nn.Module
    facts: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)


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
    learn, judge = (torch.tensor([i for part in parts for i in inner.encode(part[side]).ids]) for side in (0, 1))
    windows = judge[: len(judge) // LENGTH * LENGTH].view(-1, LENGTH)
    # Evenly spaced, so that both texts count.
    return Text(PreTrainedTokenizerFast(tokenizer_object=inner), learn, windows[:: max(1, len(windows) // 128)][:128])


def build(name: str, recipe: Recipe | None, seed: int) -> nn.Module:
    """The language model with the recipe's layers as feed-forward blocks, or dense."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=DENSE.get(name, ACTIVE),
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    if recipe is not None:
        for block in model.model.layers:
            block.mlp = layer(recipe)
    return model


def layer(recipe: Recipe) -> nn.Module:
    """The recipe's layer at the common number of active and, where it leaves the experts open, of total parameters."""
    given = recipe.arguments
    k, shared = chosen(recipe), int(given.get("shared", 1))
    kind = given.get("kind", "swiglu")
    matrices = MATRICES.get(kind if isinstance(kind, str) else kind["name"], 2)
    hidden = ACTIVE * 3 / matrices / (k + shared)
    experts = int(given.get("experts", RATIO * (k + shared) - shared))
    if recipe.d_ff is not None:
        experts = round(RATIO * ACTIVE * 3 / matrices / recipe.d_ff)
    return MoE.from_recipe(recipe.name, WIDTH, max(1, round(hidden)), experts=experts)


def count_words(model: nn.Module, ids: Tensor) -> None:
    """Tell routers by words how often each word occurs."""
    for _, one in moe.layers(model):
        if hasattr(one.router, "vocabulary"):
            one.router.fit(torch.bincount(ids, minlength=one.router.vocabulary))


def chosen(recipe: Recipe) -> int:
    """Experts that a token goes to: the recipe's top_k, the assignment's own, 1 for merged experts, 2 where it varies."""
    given = recipe.arguments
    spec = given.get("assign", "token_choice")
    bound = registry.assign.bind(spec)
    if bound.info.extras["makes"] == "merge":
        return 1
    return int(given.get("top_k") or bound.values.get("top_k") or 2)


def train(name: str, recipe: Recipe | None, text: Text, steps: int, seed: int) -> Trained:
    """Train one model from its seed; PumiceError where the loss is not finite."""
    model = build(name, recipe, seed).train()
    count_words(model, text.learn)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=2e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    history, losses, start = [], [], time.perf_counter()
    with bar(steps, f"{name} {seed}") as shown:
        for step in range(steps):
            place_B = torch.randint(len(text.learn) - LENGTH, (BATCH,), generator=generator)
            ids_BL = torch.stack([text.learn[i : i + LENGTH] for i in place_B.tolist()])
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(
                    (step + 1) / (0.05 * steps + 1), 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps))
                )
            context = RouteContext(token_ids_T=ids_BL, progress=step / steps, generator=generator)
            with context.active():
                loss = model(input_ids=ids_BL, labels=ids_BL).loss
            if not torch.isfinite(loss):
                raise PumiceError(f"{name}: the loss became {float(loss)} at step {step}.")
            (loss + moe.aux_loss(model)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            if step % max(1, steps // 40) == 0:
                loads = [one.plan.load_E.tolist() for _, one in moe.layers(model) if one.plan is not None]
                history.append({"step": step, "load": loads, "statistics": moe.statistics(model)})
            shown.update(1)
    seconds = time.perf_counter() - start
    tail = losses[-max(1, steps // 20) :]
    facts = {"train_loss": sum(tail) / len(tail), "tokens_per_second": round(steps * BATCH * LENGTH / seconds)}
    return Trained(model, {**facts, "seconds": round(seconds, 1)}, history)


@torch.no_grad()
def judge(model: nn.Module, text: Text) -> dict[str, Any]:
    """Loss on the text that was kept back, and how the experts were used there."""
    model.eval()
    loss, count, seen = 0.0, 0, []
    for ids_BL in text.judge_NL.split(BATCH):
        with RouteContext(token_ids_T=ids_BL).active():
            loss += float(model(input_ids=ids_BL, labels=ids_BL).loss) * len(ids_BL)
        count += len(ids_BL)
        seen.append(moe.statistics(model))
    names = ("load_cv", "load_max", "drop_rate", "per_token", "entropy", "unused")
    flat = [one for batch in seen for one in batch.values()]
    found = {name: sum(one[name] for one in flat) / len(flat) for name in names} if flat else {}
    return {"loss": loss / count, **found}


def parameters(model: nn.Module, per_token: float | None) -> dict[str, int]:
    """All parameters of the feed-forward blocks, and those that a token meets (routers included)."""
    total = sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)
    routed = sum(p.numel() for one in {one.experts for _, one in moe.layers(model)} for p in one.parameters())
    share = 0.0 if per_token is None else per_token / max(one.experts.experts for _, one in moe.layers(model))
    return {"total": total, "active": round(total - routed + routed * share)}


def row(name: str, recipe: Recipe | None, text: Text, steps: int, seeds: int, plots: Path | None) -> dict[str, Any]:
    """One line of the table: means over seeds, and each seed's loss."""
    runs = []
    for seed in range(seeds):
        trained = train(name, recipe, text, steps, seed)
        found = judge(trained.model, text)
        runs.append({**trained.facts, **found, **parameters(trained.model, found.get("per_token"))})
        if plots is not None and recipe is not None and seed == 0:
            draw(trained, text, plots / name)
    means = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
    facts: dict[str, Any] = {"losses": [run["loss"] for run in runs], "steps": steps, "machine": machine_stamp()}
    if recipe is not None:
        facts["recipe"] = recipe.arguments
        facts["causal"] = causal(recipe)
    return {**{key: round(value, 4) for key, value in means.items()}, **facts}


def causal(recipe: Recipe) -> bool:
    """Whether a token's result depends on earlier tokens only, by the registry's facts."""
    parts = ((registry.router, "router", "linear"), (registry.assign, "assign", "token_choice"))
    facts = [family.bind(recipe.arguments.get(key, usual)).info.extras for family, key, usual in parts]
    return all(one["causal"] for one in facts) and recipe.arguments.get("by", "token") == "token"


def draw(trained: Trained, text: Text, out: Path) -> None:
    """Load over time, and what `pumice moe inspect` draws."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    batches = [{"input_ids": ids_BL} for ids_BL in text.judge_NL.split(BATCH)]
    write(inspect_experts(trained.model, batches, text.tokenizer, progress=False), out)
    loads = torch.tensor([list(point["load"]) for point in trained.history])
    figure = Figure(figsize=(3.2 * loads.shape[1], 2.6), layout="constrained")
    for axes, block in zip(figure.subplots(1, loads.shape[1], squeeze=False)[0], range(loads.shape[1]), strict=True):
        share_PE = loads[:, block] / loads[:, block].sum(1, keepdim=True).clamp(min=1e-30)
        axes.stackplot([point["step"] for point in trained.history], share_PE.t().numpy())
        axes.set(title=f"block {block}", xlabel="step", ylabel="share of the load", ylim=(0, 1))
    figure.savefig(out / "load_over_time.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/")
    parser.add_argument("--match", default="", help="rows whose name contains this")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--plots", type=Path, help="folder for plots of every row")
    parser.add_argument("--redo", action="store_true", help="measure again what is in the results already")
    args = parser.parse_args()
    text = read(args.shared)
    rows: dict[str, Recipe | None] = {**dict.fromkeys(DENSE), **{recipe.name: recipe for recipe in recipes()}}
    for name, recipe in rows.items():
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if args.match not in name or (name in results.get("rows", {}) and not args.redo):
            continue
        try:
            made = row(name, recipe, text, args.steps, args.seeds, args.plots)
        except PumiceError as error:
            made = {"refused": str(error)}
        print(name, {k: v for k, v in made.items() if k not in ("machine", "recipe")}, flush=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results["rows"] = {**results.get("rows", {}), name: made}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({**results, "protocol": __doc__}, indent=1) + "\n")


if __name__ == "__main__":
    main()
