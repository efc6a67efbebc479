"""The small language models of `moe_compare.py`: a recipe's layers at the common size, and what of them a token meets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from pumice import moe
from pumice.core import registry
from pumice.moe import MoE, RouteContext
from pumice.moe.plan import MergePlan
from pumice.moe.recipes import Recipe, load_recipe, recipes

WIDTH, BLOCKS, ACTIVE, RATIO, VOCABULARY, LENGTH = 128, 4, 256, 4, 1024, 128
BUDGET = 3 * WIDTH * ACTIVE
"""Parameters of a feed-forward block that a token meets."""
MATRICES = {"swiglu": 3, "heterogeneous": 3}
"""Matrices of a kind of experts, 2 where it is not said: experts of two matrices are wider by half."""
SOURCES = 2
"""Texts that the windows come from: the classes and modalities of methods that need some."""


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a dense model, or a recipe with changes."""

    name: str
    hidden: int = ACTIVE
    """Of the blocks that stay dense."""
    recipe: Recipe | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    d_ff: int | None = None
    blocks: tuple[int, ...] = tuple(range(BLOCKS))
    """Those that hold the recipe's layer."""
    note: str = ""

    @property
    def arguments(self) -> dict[str, Any]:
        return {**(self.recipe.arguments if self.recipe else {}), **self.changes}


NOTES = {
    "mobile-v-moe": "the window is the image, and which of the two texts it is from is its class",
    "limoe": "the two texts are the modalities",
    "soft-moe": "as many slots as top-2 has assignments",
    "vision-soft-moe": "as many slots as top-2 has assignments",
    "attention-aware-smoe": "with PyTorch's slower attention, which gives its probabilities",
}


def rows() -> list[Row]:
    """The dense models, linear top-2 of plain experts (which no recipe is), every recipe, and PEER as in its paper."""
    plain = {"router": {"name": "linear", "renormalise": True}, "kind": "mlp", "balance": {"load": 0.01}}
    dense = [Row("dense, equal active"), Row("dense, equal total", ACTIVE * RATIO)]
    control = Row("linear top-2, relu", recipe=load_recipe("mixtral"), changes=plain)
    # The paper puts one such layer in the middle of the model.
    many = {"experts": 100_489}
    said = "317 × 317 experts in one block, the others are dense"
    peer = Row("peer, 100,489 experts", recipe=load_recipe("peer"), changes=many, blocks=(BLOCKS // 2,), note=said)
    return [
        *dense,
        control,
        *(Row(one.name, recipe=one, note=NOTES.get(one.name, "")) for one in recipes()),
        peer,
    ]


def build(row: Row, seed: int) -> nn.Module:
    """The language model with the row's layers as feed-forward blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    attention: dict[str, Any] = {"attn_implementation": "eager" if _needs_attention(row) else "sdpa"}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=row.hidden,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        **attention,
    )
    model: Any = LlamaForCausalLM(config)
    if row.recipe is not None:
        for block in row.blocks:
            model.model.layers[block].mlp = layer(row)
    if _needs_attention(row):
        for block in model.model.layers:
            block.self_attn.register_forward_hook(_show_attention)
    return model


def _needs_attention(row: Row) -> bool:
    bound = registry.router.bind(row.arguments.get("router", "linear"))
    return row.recipe is not None and "attention_BHQK" in bound.info.needs


def _show_attention(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
    context = RouteContext.current()
    if context is not None:
        context.attention_BHQK = output[1]


def chosen(arguments: dict[str, Any]) -> int:
    """Experts that a token goes to: the row's top_k, the assignment's own, 1 for merged experts, 2 where it varies."""
    bound = registry.assign.bind(arguments.get("assign", "token_choice"))
    if bound.info.extras["makes"] == "merge":
        return 1
    # Correcting the gradient of one drawn expert is what this assignment is for.
    usual = 1 if bound.name in ("sparsemixer", "balanced") else 2
    return int(arguments.get("top_k") or bound.values.get("top_k") or usual)


def layer(row: Row) -> nn.Module:
    """The row's layer with `BUDGET` active and, where its recipe leaves the experts open, RATIO times as many in all.

    A token meets the layer's own maps besides its experts, and experts of a composite layer more than once.
    """
    assert row.recipe is not None
    given = row.arguments
    shared, uses = int(given.get("shared", 1)), float(chosen(given) + int(given.get("shared", 1)))
    kind, around = _named(given.get("kind", "swiglu")), _named(row.recipe.layer)
    unit, fixed = MATRICES.get(kind["name"], 2) * WIDTH, 0.0
    if around["name"] == "vqmoe":
        uses += 1
    elif around["name"] == "stratified":
        # Expected number of strata where every later one is as likely.
        uses = sum(1 / (one + 1) for one in range(around["strata"]))
    elif around["name"] == "multi_head":
        fixed, uses, unit = 2 * WIDTH**2, uses * around["heads"], unit // around["heads"]
    elif around["name"] == "token_attention":
        fixed = 2 * WIDTH**2 / around["reduce"]
    elif kind["name"] == "autonomous":
        rank = WIDTH // 4
        fixed, unit = RATIO * uses * rank * WIDTH, rank + 2 * WIDTH
    soft = _named(given.get("router", "linear"))["name"] == "slots"
    if soft:
        # A slot has a key that every token is compared with.
        fixed = uses * LENGTH * WIDTH
    hidden = row.recipe.d_ff or max(1, round((BUDGET - fixed) / (unit * uses)))
    experts = round((RATIO * BUDGET - fixed) / (unit * hidden)) - shared
    if kind["name"] == "autonomous":
        experts = RATIO * round(uses)
    changes = dict(row.changes)
    if soft:
        changes["router"] = {"name": "slots", "slots": round(uses * LENGTH / experts)}
    experts = int(given.get("experts", experts))
    return MoE.from_recipe(row.recipe.name, WIDTH, hidden, **{**changes, "experts": experts})


def _named(spec: Any) -> dict[str, Any]:
    return {"name": spec} if spec is None or isinstance(spec, str) else dict(spec)


def count_words(model: nn.Module, ids: Tensor) -> None:
    """Tell routers by words how often each word occurs."""
    for _, one in moe.layers(model):
        if hasattr(one.router, "vocabulary"):
            one.router.fit(torch.bincount(ids, minlength=one.router.vocabulary))


def total(model: nn.Module) -> float:
    """Parameters of a feed-forward block, the mean over blocks."""
    return sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name) / BLOCKS


def active(model: Any, tokens: int) -> tuple[float, float]:
    """After a forward pass of `tokens` tokens: parameters of a feed-forward block that a token is multiplied with, and
    how often it goes to an expert; means over blocks.

    A parameter that a token meets twice counts twice. Routers and maps around the experts count whole.
    """
    met, went, holding = 0.0, 0.0, 0
    for block in model.model.layers:
        layers = [one for _, one in moe.layers(block.mlp)]
        pools = {one.experts for one in layers}
        routed = sum(p.numel() for pool in pools for p in pool.parameters())
        met += sum(p.numel() for p in block.mlp.parameters()) - routed
        holding += bool(layers)
        for one in layers:
            plan, experts = one.plan, cast(Any, one.experts)
            load_E = torch.zeros(0) if plan is None else plan.load_E.double()
            visits = plan.tokens if isinstance(plan, MergePlan) else float(load_E.sum())
            went += visits / tokens
            each = sum(p.numel() for p in experts.parameters()) / experts.experts
            if hasattr(experts, "flops"):
                met += experts.flops(0 if plan is None else plan.tokens, visits) / 2 / tokens
            elif isinstance(plan, MergePlan):
                met += visits * each / tokens
            elif plan is not None:
                met += float((load_E * experts.size_E.double()).sum()) * each / tokens
    return met / BLOCKS, went / max(holding, 1)
