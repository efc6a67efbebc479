"""The MoE layer: router → assignment → experts, each of them exchangeable.

Legend: B batch, S sequence, D model width, E experts, T tokens, G segments.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.core.registry import Bound, Family, MethodInfo
from pumice.moe.experts.base import Experts
from pumice.moe.plan import AnyPlan, BasePlan, Plan
from pumice.moe.route.base import Router
from pumice.moe.routing import RouteContext, Routing

if TYPE_CHECKING:
    from pumice.moe.composite.base import Layered

Spec = str | Mapping[str, Any]
BY = ("token", "segment")


class MoE(nn.Module):
    """A mixture-of-experts layer, in the place of a feed-forward block.

    Args:
        d_model: Width of the tokens.
        d_ff: Hidden width of each expert.
        experts: How many, or experts that exist.
        router: Name, `{"name": …, option: …}` or a module `(x_TD, context) -> Routing`.
        assign: The same; a function or module `(routing, context) -> Plan | DensePlan | MergePlan`.
        top_k: Experts of a token; None is the assignment's own (2 for token_choice).
        shared: Experts that every token goes to besides, with weight 1.
        capacity: Slots of an expert over its fair share; None drops nothing.
        kind: The kind of experts: name or `{"name": …, option: …}` (`pumice methods experts`).
        balance: Losses with their weights, `{"load": 0.01, "z": 1e-3}`, or a list of names, `{"name": …, "weight": …,
            option: …}` and functions `(plan, context) -> Tensor`; None is load 0.01, or nothing where the assignment
            is balanced by construction.
        by: "token", or "segment": the router sees the mean of each sequence or image, and all its tokens share what
            it says.
        dtype: Of the experts; routers stay in float32.

    After a forward pass `plan` is the plan (without gradients where none were asked for), `aux_loss` the sum of the
    weighted losses, `seen_E` how many tokens each expert has had, in whole or in part, since `reset_seen()`.

    Raises:
        PumiceError: parts that do not go together, with the reason.
    """

    seen_E: Tensor

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        experts: int | Experts = 8,
        router: Spec | nn.Module = "linear",
        assign: Spec | Callable[..., AnyPlan] = "token_choice",
        top_k: int | None = None,
        shared: int = 1,
        capacity: float | None = None,
        *,
        kind: Spec = "swiglu",
        balance: Mapping[str, float] | Sequence[Spec | Callable[..., Tensor]] | None = None,
        by: str = "token",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if by not in BY:
            raise PumiceError(f"by={by!r} is none of {', '.join(BY)}.")
        if isinstance(shared, bool) or not isinstance(shared, int) or shared < 0:
            raise PumiceError(f"shared={shared!r} must be a whole number, 0 for no shared experts.")
        self.name, self.by, self.d_model, self.d_ff = "", by, d_model, d_ff
        self.experts = experts if isinstance(experts, Experts) else _make_experts(kind, d_model, d_ff, experts)
        count = self.experts.experts
        if self.experts.d_model != d_model:
            raise PumiceError(f"d_model={d_model} with experts of width {self.experts.d_model}: make them equal.")
        self.shared = _make_experts(kind, d_model, d_ff * shared, 1) if shared else None
        self.router, self._router_bound = _make(registry.router, router, d_model, count)
        given = {name: value for name, value in (("top_k", top_k), ("capacity", capacity)) if value is not None}
        self.assign, self._assign_bound = _make(registry.assign, assign, d_model, count, given)
        self._check()
        router_name = self._router_bound.name if self._router_bound else None
        self.balance, self._weights = _make_balance(balance, self._fact("balanced"), router_name, d_model, count)
        self.plan: AnyPlan | None = None
        # What the router learns from instead of the plan itself: that of all processes, where `use_world` says so.
        self.observed: Callable[[AnyPlan], BasePlan] | None = None
        self.register_buffer("seen_E", torch.zeros(count, dtype=torch.int64), persistent=False)
        self._warned = False
        if dtype is not None or device is not None:
            self.to(device=device, dtype=dtype)

    @classmethod
    def from_recipe(
        cls, name: str, d_model: int, d_ff: int, experts: int | None = None, **overrides: Any
    ) -> MoE | Layered:
        """The layer that a file of `recipes/moe` describes (`switch-transformer`), with arguments of your own besides.

        Where the recipe names a `layer`, it is that layer with the MoE inside; where it gives a `d_ff`, that counts.
        `experts` None is the recipe's number, or 8.

        Raises:
            PumiceError: no such recipe, or one that breaks the schema.
        """
        from pumice.moe.recipes import load_recipe

        recipe = load_recipe(name)
        given = {} if experts is None else {"experts": experts}
        arguments = {"experts": 8, **recipe.arguments, **given, **overrides}
        d_ff = recipe.d_ff or d_ff
        if recipe.layer is None:
            return cls(d_model, d_ff, **arguments)
        return registry.moe_layer.bind(recipe.layer)(d_model, d_ff, arguments.pop("experts"), arguments)

    def forward(self, x: Tensor, context: RouteContext | None = None) -> Tensor:
        """[…, D] to the same shape; one token or none is fine.

        Raises:
            PumiceError: wrong width, NaN logits, or a context that lacks what the router needs.
        """
        if x.dim() < 2 or x.shape[-1] != self.d_model:
            raise PumiceError(f"x has shape {tuple(x.shape)}: the last axis must be d_model={self.d_model}.")
        given = context if context is not None else RouteContext.current() or RouteContext()
        known = given.for_layer(x.shape, self.experts, self.training, x.device)
        x_TD = x.reshape(-1, self.d_model)
        plan = self.route(x_TD, known)
        y_TD = self.run(x_TD, plan)
        self.remember(plan)
        given.previous = plan.routing
        return y_TD.view(x.shape)

    def route(self, x_TD: Tensor, context: RouteContext) -> AnyPlan:
        """Router, assignment and balance losses: who goes where. `context` is what `RouteContext.for_layer` made."""
        with torch.autocast(x_TD.device.type, enabled=False):
            seen_TD = x_TD.to(self.router.dtype if isinstance(self.router, Router) else torch.float32)
            if self.by == "segment":
                routing = self._by_segment(seen_TD, context)
            else:
                routing = self.router(seen_TD, context)
            self._check_logits(routing)
            plan = self.assign(routing, context)
            if plan.routing is None:
                plan.routing = routing
                plan.losses = {**routing.losses, **plan.losses}
            if self.training and isinstance(self.router, Router):
                self.router.observe(plan if self.observed is None else self.observed(plan))
            if torch.is_grad_enabled():
                for (name, weight), loss in zip(self._weights, self.balance, strict=True):
                    value = weight * loss(plan, context)
                    plan.losses[name] = plan.losses[name] + value if name in plan.losses else value
        return plan

    def run(self, x_TD: Tensor, plan: AnyPlan) -> Tensor:
        """The experts' part of the work: y_TD of a plan, shared experts included."""
        y_TD = self.experts(x_TD, plan)
        if self.shared is not None:
            everything = Plan.everything(x_TD.shape[0], x_TD)
            y_TD = y_TD + self.shared(x_TD, everything)
        return y_TD

    @property
    def aux_loss(self) -> Tensor:
        """Sum of the weighted losses of the last forward pass; 0 before the first."""
        losses = [] if self.plan is None else list(self.plan.losses.values())
        return (
            torch.stack([loss.float() for loss in losses]).sum()
            if losses
            else self.seen_E.new_zeros((), dtype=torch.float32)
        )

    def statistics(self) -> dict[str, float]:
        """Those of the last plan; empty before the first forward pass."""
        return {} if self.plan is None else self.plan.statistics()

    @property
    def _who(self) -> str:
        """For messages; `pumice.moe.layers` tells a layer its name."""
        return f"MoE layer {self.name!r}" if self.name else f"MoE layer (d_model={self.d_model})"

    def unused(self) -> list[int]:
        """Experts that have had no token since construction or `reset_seen()`."""
        return (self.seen_E == 0).nonzero().flatten().tolist()

    def reset_seen(self) -> None:
        """Count again from 0."""
        self.seen_E.zero_()

    def _by_segment(self, x_TD: Tensor, context: RouteContext) -> Routing:
        segment_T = context.need("segment_T", "by='segment'")
        size_G = torch.bincount(segment_T, minlength=context.segments).clamp_min(1).to(x_TD.dtype)
        mean_GD = x_TD.new_zeros(size_G.shape[0], self.d_model).index_add(0, segment_T, x_TD) / size_G[:, None]
        return self.router(mean_GD, context).rows(segment_T)

    def _check_logits(self, routing: Routing) -> None:
        if torch.compiler.is_compiling() or not bool(torch.isnan(routing.logits_TE).any()):
            return
        rows, columns = torch.isnan(routing.logits_TE).nonzero(as_tuple=True)
        raise PumiceError(
            f"router logits of {self._who} are NaN for {rows.unique().numel()} tokens, first token "
            f"{int(rows[0])}, expert {int(columns[0])}: its inputs or the router's weights are not finite."
        )

    def remember(self, plan: AnyPlan) -> None:
        """Note a plan that has run, for `plan`, `aux_loss` and `seen_E`."""
        self.plan = plan if torch.is_grad_enabled() else plan.detach()
        with torch.no_grad():
            self.seen_E += plan.load_E.ceil().long()
        if torch.compiler.is_compiling() or self._warned or not plan.dropped:
            return
        self._warned = True
        total = plan.dropped + int(plan.load_E.sum())
        warnings.warn(
            f"{self._who} dropped {plan.dropped} of {total} assignments for want of capacity; said once, "
            "plan.dropped counts them. Raise capacity, or leave it out to drop nothing.",
            stacklevel=3,
        )

    def _fact(self, name: str) -> Any:
        """A registry fact of the assignment; False or the default where it is the caller's own."""
        if self._assign_bound is None:
            return registry.assign.extras[name]
        return self._assign_bound.info.extras[name]

    def _check(self) -> None:
        """Refuse what cannot work together."""
        name = self._assign_bound.name if self._assign_bound else "the assignment given"
        values = self._assign_bound.values if self._assign_bound else {}
        top_k = values.get("top_k")
        count = self.experts.experts
        if top_k is not None and not 1 <= top_k <= count:
            raise PumiceError(f"top_k={top_k} with experts={count}: a token can go to 1 to {count} of them.")
        if values.get("capacity") is not None and values["capacity"] <= 0:
            raise PumiceError(f"capacity={values['capacity']} must be above 0; leave it out to drop nothing.")
        _check_parts(self._router_bound, name, self._fact, registry.experts.of(self.experts))

    def __getstate__(self) -> dict[str, Any]:
        # A plan with gradients cannot be copied, and belongs to one forward pass only.
        return {**self.__dict__, "plan": None}

    def extra_repr(self) -> str:
        assign = self._assign_bound.describe() if self._assign_bound else self.assign
        return f"assign={assign}, by={self.by!r}"


def _check_parts(router: Bound | None, assign: str, fact: Callable[[str], Any], kind: MethodInfo | None) -> None:
    """Refuse a router, an assignment and experts that do not go together; what is not registered is the caller's."""
    if kind is not None and fact("makes") == "merge" and not kind.extras["merges"]:
        raise PumiceError(f"assign={assign!r} averages experts, and those of kind={kind.name!r} differ in shape.")
    if router is None:
        return
    columns, forbids, wanted = (router.info.extras[name] for name in ("columns", "forbids", "kind"))
    if columns not in fact("columns"):
        takes = " or ".join(one.name for one in registry.assign.members() if columns in one.extras["columns"])
        raise PumiceError(
            f"router={router.name!r} scores {columns}, and assign={assign!r} takes {' or '.join(fact('columns'))}: "
            f"use assign={takes}."
        )
    if forbids and not fact("forbids"):
        raise PumiceError(f"router={router.name!r} forbids experts, and assign={assign!r} has to use them all.")
    if kind is None:
        return
    if wanted not in (None, kind.name):
        raise PumiceError(f"router={router.name!r} looks into experts of kind={wanted!r}, not {kind.name!r}.")
    if kind.extras["router"] not in (None, router.name):
        raise PumiceError(
            f"kind={kind.name!r} runs on what router={kind.extras['router']!r} leaves, not {router.name!r}."
        )


def _make_experts(kind: Spec, d_model: int, d_ff: int, count: int) -> Experts:
    return registry.experts.bind(kind)(d_model, d_ff, count)


def _make(
    family: Family, spec: Any, d_model: int, experts: int, given: Mapping[str, Any] | None = None
) -> tuple[Any, Bound | None]:
    """A part of the layer, and what the registry knows of it (None for one of the caller's own).

    `given` are arguments of the layer that the part takes as options.
    """
    given = dict(given or {})
    if not isinstance(spec, str | Mapping):
        if given:
            name, value = next(iter(given.items()))
            raise PumiceError(f"{name}={value!r} beside an instance of {family.name}: set it on the instance.")
        return spec, None
    bound = family.bind(spec)
    for name, value in given.items():
        if name not in bound.info.options:
            why = "its plan is balanced or soft, so that nothing can overflow" if name == "capacity" else "it has no k"
            raise PumiceError(f"{name}={value!r} with {family.name}={bound.name!r}: {why}; leave {name} out.")
    bound = bound.info.bind({**bound.options, **given})
    return (bound(d_model, experts) if inspect.isclass(bound.info.obj) else bound), bound


def _make_balance(
    spec: Any, balanced: bool, router: str | None, d_model: int, experts: int
) -> tuple[nn.ModuleList, list[tuple[str, float]]]:
    """The balance losses as modules, with names and weights."""
    if spec is None:
        spec = {} if balanced else {"load": 0.01}
    if isinstance(spec, Mapping) and "name" not in spec:
        spec = [{"name": name, "weight": weight} for name, weight in spec.items()]
    if isinstance(spec, str | Mapping):
        spec = [spec]
    losses, weights = nn.ModuleList(), []
    for one in spec:
        if not isinstance(one, str | Mapping):
            losses.append(one if isinstance(one, nn.Module) else _Call(one))
            weights.append((getattr(one, "__name__", type(one).__name__), 1.0))
            continue
        options = {"name": one} if isinstance(one, str) else dict(one)
        weight = options.pop("weight", None)
        loss, bound = _make(registry.balance, options, d_model, experts)
        assert bound is not None
        wanted = bound.info.extras["router"]
        if wanted is not None and router not in (wanted, None):
            raise PumiceError(
                f"balance={bound.name!r} reads what router={wanted!r} leaves, and the router is {router!r}."
            )
        losses.append(loss if isinstance(loss, nn.Module) else _Call(loss))
        weights.append((bound.name, float(bound.info.extras["weight"] if weight is None else weight)))
    return losses, weights


class _Call(nn.Module):
    """A plain function among modules."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, plan: AnyPlan, context: RouteContext) -> Tensor:
        return self.function(plan, context)
