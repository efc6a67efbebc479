"""What a router may know and what it says: `RouteContext` goes in beside the tokens, `Routing` comes out.

Legend: T tokens, E experts, C candidates, G segments (sequences or images), B batch, H heads, Q/K positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pumice.core.errors import PumiceError

# A plain list, since torch.compile cannot look into a ContextVar.
_active: list[RouteContext] = []


@dataclass(eq=False)
class RouteContext:
    """What a router, an assignment or a balance loss may know beyond the tokens' states; every field may be missing.

    The layer fills in `batch`, `seqlen`, `segment_T`, `experts` and `training`, the caller the rest, either as the
    layer's argument or for a whole model by `with context.active():`. Fields that end in `_T` may have any shape with
    T elements. Where one context serves several layers, each leaves its routing in `previous` for the next.
    """

    batch: int | None = None
    """Sequences in x_BSD, where x has three axes."""
    seqlen: int | None = None
    segment_T: Tensor | None = None
    """int64: which sequence or image a token is of, 0..G-1; the layer takes the sequences of x_BSD if it is missing."""
    token_ids_T: Tensor | None = None
    modality_T: Tensor | None = None
    """int64: 0 for the first modality, 1 for the second, …"""
    labels_G: Tensor | None = None
    """int64: the class of each segment, for routers that are supervised."""
    attention_BHQK: Tensor | None = None
    """Attention probabilities of the attention in front of this layer."""
    previous: Routing | None = None
    """The routing of the MoE layer before."""
    progress: float | None = None
    """Share of the training that is done, 0..1; None while nobody trains."""
    experts: Any = None
    """The layer's experts (`pumice.moe.experts.base.Experts`)."""
    generator: torch.Generator | None = None
    """Where noise comes from; None is PyTorch's own."""
    training: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever else a router of your own wants to be told."""

    def need(self, name: str, who: str) -> Any:
        """The field `name`, for a router `who` that cannot do without.

        Raises:
            PumiceError: it is None; the message says how to give it.
        """
        value = getattr(self, name)
        if value is None:
            raise PumiceError(
                f"context.{name}=None, and {who} needs it: call the layer with RouteContext({name}=…), or the model "
                f"inside `with RouteContext({name}=…).active():`."
            )
        return value

    @contextmanager
    def active(self) -> Iterator[RouteContext]:
        """Every MoE layer that is called inside without a context of its own gets this one.

        Where activations are recomputed in the backward pass, that pass has to run inside too.
        """
        _active.append(self)
        try:
            yield self
        finally:
            _active.pop()

    @staticmethod
    def current() -> RouteContext | None:
        """The active context, or None."""
        return _active[-1] if _active else None

    @property
    def segments(self) -> int:
        """How many segments there are; 0 where nobody said."""
        if self.segment_T is None or self.segment_T.numel() == 0:
            return 0
        return self.batch if self.batch is not None else int(self.segment_T.max()) + 1

    def for_layer(self, shape: torch.Size, experts: Any, training: bool, device: torch.device) -> RouteContext:
        """A copy with what a layer knows of its input `shape` ([..., D]): batch, seqlen, segments, flat `_T` fields.

        Raises:
            PumiceError: a field that has not one entry per token.
        """
        tokens = shape[:-1].numel()
        flat: dict[str, Any] = {}
        for name in ("segment_T", "token_ids_T", "modality_T"):
            value = getattr(self, name)
            if value is None:
                continue
            if value.numel() != tokens:
                raise PumiceError(f"context.{name} has {value.numel()} entries for {tokens} tokens: give one a token.")
            flat[name] = value.reshape(-1).to(device)
        if len(shape) == 3 and "segment_T" not in flat:
            flat["batch"], flat["seqlen"] = shape[0], shape[1]
            flat["segment_T"] = torch.arange(shape[0], device=device).repeat_interleave(shape[1])
        return dataclasses.replace(self, experts=experts, training=training, **flat)


@dataclass(eq=False)
class Routing:
    """What a router says: for each token and expert a raw logit, a combine weight, and what selection compares.

    Columns are experts, unless the registry says otherwise of the router. "candidates": `candidate_TC` names the C
    experts that each token's columns stand for, so that a router over very many experts never makes a matrix [T, E].
    "slots": every expert has `slots` columns side by side. Where they are not experts, `experts` says how many there
    are.
    """

    logits_TE: Tensor
    """Raw scores before softmax or the like: for the z-loss and for looking at."""
    weight_TE: Tensor
    """The combine weight that an expert gets if it is selected, >= 0, differentiable."""
    select_TE: Tensor | None = None
    """What the assignment compares, larger first; default `weight_TE`. Noise and balancing biases change only this."""
    allowed_TE: Tensor | None = None
    """bool; False keeps a token from an expert whatever the scores."""
    renormalise: bool = False
    """Whether a token's selected weights are divided by their sum."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """The router's own losses, already multiplied by their weights."""
    cache: dict[str, Any] = field(default_factory=dict)
    """Partial results that the experts may use again."""
    candidate_TC: Tensor | None = None
    slots: int = 1
    experts: int = 0

    def __post_init__(self) -> None:
        if self.experts:
            return
        if self.candidate_TC is not None:
            raise PumiceError("experts=0 beside candidate_TC: give Routing the number of experts.")
        self.experts = self.logits_TE.shape[1] // self.slots

    @property
    def tokens(self) -> int:
        return self.weight_TE.shape[0]

    @property
    def score_TE(self) -> Tensor:
        """What selection compares, without gradients, -inf where an expert is not allowed."""
        score_TE = (self.weight_TE if self.select_TE is None else self.select_TE).detach()
        return score_TE if self.allowed_TE is None else score_TE.masked_fill(~self.allowed_TE, -torch.inf)

    @property
    def probability_TE(self) -> Tensor:
        """Each token's weights over all experts (allowed ones), divided by their sum; differentiable."""
        weight_TE = self.weight_TE
        if self.allowed_TE is not None:
            weight_TE = weight_TE.masked_fill(~self.allowed_TE, 0)
        return weight_TE / weight_TE.sum(1, keepdim=True).clamp_min(torch.finfo(weight_TE.dtype).tiny)

    def per_expert(self, value_TE: Tensor) -> Tensor:
        """Sum over tokens: [E], also where the columns are candidates or slots."""
        if self.candidate_TC is None:
            return value_TE.sum(0).view(self.experts, self.slots).sum(1)
        return value_TE.new_zeros(self.experts).index_add(0, self.candidate_TC.flatten(), value_TE.flatten())

    def rows(self, index_T: Tensor) -> Routing:
        """The routing whose row t is this one's row `index_T[t]`: a segment's decision given to each of its tokens."""
        names = ("logits_TE", "weight_TE", "select_TE", "allowed_TE", "candidate_TC")
        picked = {name: None if getattr(self, name) is None else getattr(self, name)[index_T] for name in names}
        return dataclasses.replace(self, **picked)

    def detach(self) -> Routing:
        """The same without gradients and without the cache."""
        plain: dict[str, Any] = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        plain = {name: value.detach() if isinstance(value, Tensor) else value for name, value in plain.items()}
        plain |= {"losses": {name: loss.detach() for name, loss in self.losses.items()}, "cache": {}}
        return Routing(**plain)
