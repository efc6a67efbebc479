"""The rows of `moe_compare.json` read for tables, remarks and plots: which row a router is judged by, and how it fared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Results = dict[str, Any]
DENSE, LARGE = "dense, equal active", "dense, equal total"
SWIGLU, RELU, GELU = "mixtral", "linear top-2, relu", "vision-token-choice-softmax"
"""Linear top-2 token choice of each form of experts: what a router has to beat."""
BASES = {
    SWIGLU: "linear top-2 of SwiGLU experts",
    RELU: "linear top-2 of ReLU experts",
    GELU: "linear top-2 of GELU experts",
}
GELUS = ("gelu", "gelu_tanh", "silu")
GATED = ("swiglu", "heterogeneous", "autonomous")
SLACK = 0.03
"""Active parameters (in training or in use, where there are more) that differ by no larger share count as equal."""
USUAL = {"router": "linear", "assign": "token_choice", "kind": ("swiglu", "mlp")}


@dataclass(frozen=True)
class Fared:
    """One row: means over its seeds, and each seed's loss."""

    name: str
    losses: tuple[float, ...]
    mean: dict[str, float]
    causal: bool
    entry: Results

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)


def fared(results: Results) -> dict[str, Fared]:
    """Every row that was trained to the end at least once, best first."""
    found = []
    for name, entry in results.get("rows", {}).items():
        seeds = [seed for _, seed in sorted(entry["seeds"].items()) if "loss" in seed]
        if seeds:
            keys = [key for key in seeds[0] if isinstance(seeds[0][key], int | float) and key != "causal"]
            mean = {key: sum(seed[key] for seed in seeds) / len(seeds) for key in keys}
            losses = tuple(seed["loss"] for seed in seeds)
            found.append(Fared(name, losses, mean, all(seed["causal"] for seed in seeds), entry))
    return {one.name: one for one in sorted(found, key=lambda one: one.loss)}


def _name(spec: Any) -> str | None:
    return spec if spec is None or isinstance(spec, str) else spec["name"]


def base_of(row: Fared) -> str | None:
    """The linear top-2 row with the same form of experts; None for dense rows and for those rows themselves."""
    if "recipe" not in row.entry or row.name in BASES:
        return None
    given = row.entry["arguments"]
    kind = given.get("kind", "swiglu")
    if _name(kind) in GATED:
        return SWIGLU
    usual = "gelu" if _name(kind) == "neurons" else "relu"
    activation = usual if isinstance(kind, str) else kind.get("activation", usual)
    return GELU if activation in GELUS else RELU


def parts(row: Fared) -> list[tuple[str, str]]:
    """(family, method) of whatever the row has that linear top-2 token choice has not."""
    given = row.entry["arguments"]
    found: list[Any] = []
    for family, key in (("router", "router"), ("assign", "assign"), ("experts", "kind")):
        name, usual = _name(given.get(key)), USUAL[key]
        if name is not None and name != usual and name not in usual:
            found.append((family, name))
    if row.entry.get("layer") is not None:
        found.append(("moe_layer", str(_name(row.entry["layer"]))))
    if not found:
        balance = given.get("balance") or {}
        names = [_name(one) for one in balance] if isinstance(balance, list) else list(balance)
        found = [("balance", name) for name in names if name not in (None, "load")]
    return found


@dataclass(frozen=True)
class Verdict:
    """How a row did beside its base: the seeds it won, and whether the two can be compared."""

    base: Fared
    won: int
    seeds: int
    unfair: str
    """Why a lower loss would not count, or a higher one; empty where it does."""

    @property
    def words(self) -> str:
        if self.unfair:
            return self.unfair
        if self.won == self.seeds:
            return "better" if self.seeds > 1 else "better in the only seed"
        return "nowhere better" if not self.won else f"better in {self.won} of {self.seeds} seeds"


def verdict(row: Fared, rows: dict[str, Fared]) -> Verdict | None:
    """The row beside its base, seed by seed; None where there is none."""
    name = base_of(row)
    if name is None or name not in rows:
        return None
    base = rows[name]
    pairs = list(zip(row.losses, base.losses, strict=False))
    won = sum(own < other for own, other in pairs)
    share = max(row.mean["active"], row.mean["active_training"]) / base.mean["active"]
    unfair = ""
    if won and not row.causal:
        unfair = "lower, but sees the future"
    elif won and share > 1 + SLACK:
        unfair = f"lower, with {share:.1f}× the active parameters"
    elif won < len(pairs) and share < 1 - SLACK:
        unfair = f"higher, with {share:.2f}× the active parameters"
    return Verdict(base, won, len(pairs), unfair)
