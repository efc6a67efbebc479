"""How a mixture of experts uses its experts: load, which kinds of tokens go where, how often a choice repeats.

Legend: T tokens, E experts, K experts of a token, N kinds of tokens, A assignments.
"""

from __future__ import annotations

import inspect
import json
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pumice.core.calls import call_model
from pumice.core.errors import PumiceError
from pumice.core.progress import bar
from pumice.core.stats import evaluating
from pumice.moe.layer import MoE
from pumice.moe.plan import MergePlan, Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("word", "continuation", "number", "punctuation", "space", "other")
"""What a token looks like: begins a word, goes on with one, …; "other" where nobody knows the text."""
OTHER = KINDS.index("other")
BLANK = "\u0120\u2581\u010a \t\n"
"""Marks of a blank in front, in byte-level and SentencePiece vocabularies, and blanks themselves."""


@dataclass
class Usage:
    """What one MoE layer did with the tokens it saw.

    Attributes:
        count_NE: assignments by kind of token and expert (fractions where tokens are mixed).
        tokens_N: tokens by kind.
        repeats, neighbours: pairs of neighbouring tokens that share an expert, and all pairs.
        first: the strongest expert's share of a token's weight, summed over tokens.
    """

    name: str
    experts: int
    count_NE: Tensor = field(default_factory=lambda: torch.zeros(0))
    tokens_N: Tensor = field(default_factory=lambda: torch.zeros(len(KINDS)))
    repeats: int = 0
    neighbours: int = 0
    first: float = 0.0

    def __post_init__(self) -> None:
        if not self.count_NE.numel():
            self.count_NE = torch.zeros(len(KINDS), self.experts, dtype=torch.float64)

    @property
    def load_E(self) -> Tensor:
        """Assignments of each expert."""
        return self.count_NE.sum(0)

    @property
    def unused(self) -> list[int]:
        return (self.load_E == 0).nonzero().flatten().tolist()

    @property
    def specialisation(self) -> float:
        """Mutual information of kind and expert over the entropy of the kinds: 0 is none, 1 an expert tells the kind."""
        joint_NE = self.count_NE / self.count_NE.sum().clamp(min=1e-30)
        kind_N1, expert_1E = joint_NE.sum(1, keepdim=True), joint_NE.sum(0, keepdim=True)
        entropy = float(torch.special.entr(kind_N1).sum())
        shared = torch.special.xlogy(joint_NE, joint_NE / (kind_N1 * expert_1E).clamp(min=1e-30)).sum()
        return max(0.0, float(shared)) / entropy if entropy > 1e-9 else 0.0

    def add(self, index_TK: Tensor, weight_TK: Tensor, kind_T: Tensor, segment: int) -> None:
        """Count one call: experts and weights of every token, -1 where a token has fewer than K."""
        given_TK = (index_TK >= 0) & (index_TK < self.experts)
        column_TK = index_TK.where(given_TK, 0)
        for kind in range(len(KINDS)):
            picked = column_TK[kind_T == kind][given_TK[kind_T == kind]]
            self.count_NE[kind] += torch.bincount(picked, minlength=self.experts)[: self.experts]
        self.tokens_N += torch.bincount(kind_T, minlength=len(KINDS))
        size_TK = weight_TK.float().abs() * given_TK
        total_T = size_TK.sum(1)
        self.first += float((size_TK.amax(1) / total_T.clamp(min=1e-30))[total_T > 0].sum()) if size_TK.numel() else 0.0
        self._neighbours(index_TK, given_TK, segment)

    def _neighbours(self, index_TK: Tensor, given_TK: Tensor, segment: int) -> None:
        """Pairs of neighbours within each segment of `segment` tokens."""
        tokens = index_TK.shape[0]
        if tokens < 2:
            return
        both = given_TK[1:, :, None] & given_TK[:-1, None, :]
        same = ((index_TK[1:, :, None] == index_TK[:-1, None, :]) & both).any(2).any(1)
        inside = torch.arange(1, tokens, device=index_TK.device) % max(segment, 1) != 0
        self.repeats += int((same & inside).sum())
        self.neighbours += int(inside.sum())

    def to_dict(self) -> dict[str, Any]:
        load_E, tokens = self.load_E, float(self.tokens_N.sum())
        mean = float(load_E.mean()) or 1.0
        return {
            "name": self.name,
            "experts": self.experts,
            "tokens": int(tokens),
            "per_token": float(load_E.sum()) / max(tokens, 1),
            "load_max": float(load_E.max()) / mean,
            "load_min": float(load_E.min()) / mean,
            "load_cv": float(load_E.std(unbiased=False)) / mean,
            "unused": self.unused,
            "first": self.first / max(tokens, 1),
            "repeats": self.repeats / max(self.neighbours, 1),
            "specialisation": self.specialisation,
            "load": load_E.tolist(),
            "by_kind": dict(zip(KINDS, self.count_NE.tolist(), strict=True)),
        }


@dataclass
class Inspection:
    """Every MoE layer of a model on one text."""

    layers: list[Usage]
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "kinds": list(KINDS), "layers": [layer.to_dict() for layer in self.layers]}

    @property
    def unused(self) -> list[str]:
        """Names of the experts that no token went to."""
        return [f"{layer.name} expert {expert}" for layer in self.layers for expert in layer.unused]


def kinds_of(tokenizer: Any) -> Tensor:
    """The kind of each token id of a vocabulary, by the text of the token: int64 [vocabulary]."""
    pieces: Sequence[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    return torch.tensor([OTHER if i in special else _kind(piece) for i, piece in enumerate(pieces)])


def _kind(piece: str | None) -> int:
    if not piece:
        return OTHER
    bare = piece.removeprefix("##").strip(BLANK)
    if not bare:
        return KINDS.index("space")
    if all(unicodedata.category(letter).startswith("N") for letter in bare):
        return KINDS.index("number")
    if not any(letter.isalnum() for letter in bare):
        return KINDS.index("punctuation")
    begins = piece[0] in BLANK or (piece[0].isupper() and not piece.startswith("##"))
    return KINDS.index("word" if begins else "continuation")


@contextmanager
def watching(model: nn.Module, kinds: Tensor | None = None) -> Iterator[_Watch]:
    """Count the choices of every MoE layer in the passes inside: Pumice's layers and Transformers' expert modules.

    Raises:
        PumiceError: the model has no MoE layer.
    """
    watch = _Watch(kinds)
    handles = [model.register_forward_pre_hook(watch.before, with_kwargs=True)]
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            watch.layers[name] = Usage(name or "layer", module.experts.experts)
            handles.append(module.register_forward_hook(watch.pumice(name)))
        elif _is_experts(module):
            watch.layers[name] = Usage(name, int(getattr(module, "num_experts")))  # noqa: B009
            handles.append(module.register_forward_pre_hook(watch.transformers(name), with_kwargs=True))
    try:
        if not watch.layers:
            raise PumiceError(
                f"model: {type(model).__name__} has no mixture of experts: neither pumice.moe.MoE nor a Transformers "
                "module that is called with top_k_index."
            )
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _is_experts(module: nn.Module) -> bool:
    return hasattr(module, "num_experts") and "top_k_index" in inspect.signature(module.forward).parameters


class _Watch:
    """Hooks, and what they have counted."""

    def __init__(self, kinds: Tensor | None) -> None:
        self.layers: dict[str, Usage] = {}
        self.kinds, self.kind_T, self.seqlen, self.tokens = kinds, torch.zeros(0, dtype=torch.long), 1, 0

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args and isinstance(args[0], Tensor) else None)
        self.kind_T, self.seqlen = torch.zeros(0, dtype=torch.long), 1
        if ids is None or ids.is_floating_point() or ids.dim() != 2:
            return
        self.seqlen, self.tokens = ids.shape[1], self.tokens + ids.numel()
        if self.kinds is None:
            self.kind_T = torch.full((ids.numel(),), OTHER)
        else:
            # Ids beyond the tokenizer's vocabulary are padding of the embedding.
            known = torch.cat([self.kinds, torch.tensor([OTHER])])
            self.kind_T = known[ids.flatten().cpu().clamp(max=len(self.kinds))]

    def kinds_for(self, tokens: int) -> Tensor:
        return self.kind_T if self.kind_T.shape[0] == tokens else torch.full((tokens,), OTHER)

    def pumice(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            assert isinstance(module, MoE)
            plan, usage = module.plan, self.layers[name]
            if isinstance(plan, Plan):
                usage.add(*_columns(plan), self.kinds_for(plan.tokens), self.seqlen)
            elif plan is not None:
                # Soft plans choose nothing; an expert's part of each token is counted instead.
                part = plan.weight_GE[plan.group_T] if isinstance(plan, MergePlan) else plan.dispatch_GLS
                part_TE = part.detach().double().cpu().reshape(plan.tokens, plan.experts, -1).sum(2)
                kind_T = self.kinds_for(plan.tokens)
                usage.count_NE.index_add_(0, kind_T, part_TE)
                usage.tokens_N += torch.bincount(kind_T, minlength=len(KINDS))

        return hook

    def transformers(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            found = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            index_TK, weight_TK = found["top_k_index"], found["top_k_weights"]
            index_TK = index_TK.detach().reshape(-1, index_TK.shape[-1]).cpu()
            weight_TK = weight_TK.detach().reshape(index_TK.shape[0], -1).cpu()
            if weight_TK.shape != index_TK.shape:
                weight_TK = weight_TK.gather(1, index_TK)
            self.layers[name].add(index_TK, weight_TK, self.kinds_for(index_TK.shape[0]), self.seqlen)

        return hook


def _columns(plan: Plan) -> tuple[Tensor, Tensor]:
    """A plan as experts and weights of each token, [T, K], filled up with -1 and 0."""
    order_A, starts_T1 = plan.by_token_A, plan.starts_T1
    widest = int(starts_T1.diff().max()) if plan.tokens else 0
    index_TK = torch.full((plan.tokens, widest), -1)
    weight_TK = torch.zeros(plan.tokens, widest)
    token_A = plan.token_A[order_A].cpu()
    place_A = (torch.arange(token_A.shape[0]) - starts_T1.cpu()[token_A]) if widest else token_A
    index_TK[token_A, place_A] = plan.expert_A[order_A].cpu()
    weight_TK[token_A, place_A] = plan.weight_A.detach()[order_A].float().cpu()
    return index_TK, weight_TK


@torch.no_grad()
def inspect_experts(
    model: nn.Module, batches: Sequence[Any], tokenizer: Any = None, *, progress: bool = True
) -> Inspection:
    """Run batches through a model and count which experts its tokens go to.

    Args:
        batches: as `pumice.core.calls.call_model` takes them.
        tokenizer: tells the kinds of tokens apart; without one all are "other".

    Raises:
        PumiceError: no batch, or no MoE layer in the model.
    """
    if not batches:
        raise PumiceError("batches=[] holds nothing to look at.")
    kinds = None if tokenizer is None else kinds_of(tokenizer)
    with watching(model, kinds) as watch, evaluating(model), bar(len(batches), "inspect", enabled=progress) as shown:
        for batch in batches:
            call_model(model, batch)
            shown.update(1)
    return Inspection(list(watch.layers.values()), watch.tokens)


def write(found: Inspection, out: Path) -> list[Path]:
    """`inspect.json`, and with matplotlib `load.png` and `kinds.png`, in folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "inspect.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    files = [out / "inspect.json"]
    from pumice.analyze.plots import available

    if available():
        for name, draw in (("load", draw_load), ("kinds", draw_kinds)):
            figure = draw(found)
            figure.savefig(out / f"{name}.png", dpi=150, bbox_inches="tight")
            files.append(out / f"{name}.png")
    return files


def draw_load(found: Inspection) -> Figure:
    """A row a layer, a column an expert: its load over the layer's mean."""
    from matplotlib.figure import Figure

    widest = max(layer.experts for layer in found.layers)
    grid = torch.full((len(found.layers), widest), torch.nan)
    for row, layer in enumerate(found.layers):
        grid[row, : layer.experts] = layer.load_E / layer.load_E.mean().clamp(min=1e-30)
    figure = Figure(figsize=(min(12, 2.5 + 0.35 * widest), min(12, 1.6 + 0.3 * len(found.layers))))
    axes = figure.subplots()
    image = axes.imshow(
        grid.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=max(2.0, float(grid.nan_to_num().max()))
    )
    axes.set_yticks(range(len(found.layers)), [layer.name for layer in found.layers], fontsize=7)
    axes.set_xlabel("expert")
    axes.set_title("Tokens of each expert, over the layer's mean", fontsize=9)
    figure.colorbar(image, ax=axes)
    return figure


def draw_kinds(found: Inspection, most: int = 12) -> Figure:
    """For up to `most` layers, evenly spaced: how much more often than others a kind of token goes to an expert."""
    from matplotlib.figure import Figure

    count = min(most, len(found.layers))
    chosen = [found.layers[i * (len(found.layers) - 1) // max(count - 1, 1)] for i in range(count)]
    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, 2.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes, layer in zip(grid.flat, chosen, strict=False):
        present = layer.tokens_N > 0
        share_NE = layer.count_NE / layer.count_NE.sum(1, keepdim=True).clamp(min=1e-30)
        usual_E = layer.load_E / layer.load_E.sum().clamp(min=1e-30)
        lift_NE = (share_NE / usual_E.clamp(min=1e-30))[present]
        image = axes.imshow(
            lift_NE.clamp(min=1 / 8, max=8).log2().numpy(), aspect="auto", cmap="RdBu_r", vmin=-3, vmax=3
        )
        axes.set_yticks(
            range(int(present.sum())), [k for k, there in zip(KINDS, present, strict=True) if there], fontsize=7
        )
        axes.set_title(f"{layer.name}: specialisation {layer.specialisation:.2f}", fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in list(grid.flat)[count:]:
        axes.axis("off")
    if image is not None:
        figure.colorbar(image, ax=grid, label="log2 of share over the expert's usual share")
    return figure
