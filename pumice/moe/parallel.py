"""Expert parallelism: each process of a group keeps its share of the experts, and tokens travel to them and back.

Between plan and experts stands an all-to-all of `torch.distributed`; routers, assignments and kernels stay as they are.
Legend: T tokens, D model width, E experts (of all processes), L experts of one process, A assignments, U rows sent,
R rows received, P assignments received, W processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.moe.exchange import Exchange
from pumice.moe.experts.base import Experts
from pumice.moe.layer import MoE
from pumice.moe.model import layers
from pumice.moe.plan import AnyPlan, MergePlan, Plan
from pumice.moe.world import WorldPlan, use_world

BALANCE = ("local", "global")


class ParallelExperts(Experts):
    """The experts `[rank · L, (rank + 1) · L)` of a layer, in the place of all of them.

    A token goes once to each process that has experts for it, with its combine weights, and its weighted sum of their
    outputs comes back once. Parameters keep their names and are [L, …]. Their gradients are divided by W, so that with
    the mean over processes that DDP and FSDP2 take of all others, everything is the gradient of the mean of the
    processes' losses. `state_dict` has them as DTensors [E, …] sharded on the first axis; `load_state_dict` takes those
    or plain tensors of all experts.
    """

    def __init__(self, kind: Experts, exchange: Exchange) -> None:
        super().__init__(kind.d_model, kind.d_ff, kind.experts)
        self.exchange, self.local = exchange, kind.experts // exchange.world
        self.first = exchange.rank * self.local
        self._size_E = kind.size_E
        for name, weight_E in list(kind.named_parameters(recurse=False)):
            mine = weight_E.detach()[self.first : self.first + self.local].clone()
            self.register_parameter(name, nn.Parameter(mine, requires_grad=weight_E.requires_grad))
            delattr(kind, name)
        kind.experts = self.local
        # In a tuple, since it is no part of the model any more: only its formula is used.
        self._kind = (kind,)

    @property
    def size_E(self) -> Tensor:
        return self._size_E

    def forward(self, x_TD: Tensor, plan: AnyPlan) -> Tensor:
        if isinstance(plan, MergePlan):
            raise PumiceError(f"MoE layer {self.exchange.name!r}: {MERGE}")
        return super().forward(x_TD, plan)

    def compute(self, x_TD: Tensor, plan: Plan, weights: dict[str, Tensor]) -> Tensor:
        if torch.is_autocast_enabled(x_TD.device.type):
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        exchange, parcels = self.exchange, _Parcels.of(plan, self.local, self.exchange.world)
        counts_W2 = torch.stack([parcels.rows_W, parcels.pairs_W], dim=1)
        sent, got = exchange.meet(self._call(x_TD, plan, weights), counts_W2)
        rows, pairs = ([one[column] for one in sent] for column in (0, 1))
        rows_got, pairs_got = ([one[column] for one in got] for column in (0, 1))
        pair_P = exchange.rows(parcels.pair_A, pairs, pairs_got, "the choice of experts")
        weight_P = exchange.rows(plan.weight_A, pairs, pairs_got, "combine weights")
        x_RD = exchange.rows(x_TD[parcels.token_U], rows, rows_got, "tokens")
        here = _unpack(pair_P, weight_P, rows_got, pairs_got, self.local)
        kind = self._kind[0].train(self.training)
        y_RD = kind.compute(x_RD, here, {name: _averaged(weight, exchange.world) for name, weight in weights.items()})
        y_UD = exchange.rows(y_RD, rows_got, rows, "results")
        # Wide, as a kernel's own sum over a token's experts is.
        wide = torch.float32 if y_UD.dtype in (torch.bfloat16, torch.float16) else y_UD.dtype
        y_TD = y_UD.new_zeros(plan.tokens, y_UD.shape[1], dtype=wide)
        return y_TD.index_add(0, parcels.token_U, y_UD.to(wide)).to(y_UD.dtype)

    def _call(self, x_TD: Tensor, plan: Plan, weights: dict[str, Tensor]) -> tuple[int, ...]:
        """What has to be the same on all processes, so that each sends what the others wait for."""
        wants = [x_TD.requires_grad, plan.weight_A.requires_grad, any(w.requires_grad for w in weights.values())]
        graph = sum(2**bit for bit, want in enumerate(wants) if want and torch.is_grad_enabled())
        return graph, DTYPES.index(x_TD.dtype), x_TD.shape[1], self.experts

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.weights():
            destination[prefix + name] = self._as_dtensor(destination[prefix + name])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        errors = rest[-1]
        for name, mine in self.weights().items():
            value = state_dict.get(prefix + name)
            if value is None:
                continue
            if value.shape[0] != self.experts:
                errors.append(
                    f"{prefix}{name} has {value.shape[0]} experts and the layer {self.experts}: give a checkpoint of "
                    "all experts (torch's get_model_state_dict(full_state_dict=True) makes one)."
                )
                state_dict[prefix + name] = mine.detach()
                continue
            state_dict[prefix + name] = self._share(value)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _as_dtensor(self, mine: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(mine, self.exchange.mesh(mine.device.type), [Shard(0)], run_check=False)

    def _share(self, value_E: Tensor) -> Tensor:
        """This process's part of a tensor of all experts; no communication where it is sharded as this layer is."""
        from torch.distributed.tensor import DTensor

        if isinstance(value_E, DTensor):
            local = value_E.to_local()
            if value_E.placements[0].is_shard(0) and value_E.device_mesh.ndim == 1 and local.shape[0] == self.local:
                return local
            value_E = value_E.full_tensor()
        return value_E[self.first : self.first + self.local].clone()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, here={self.first}..{self.first + self.local - 1}, world={self.exchange.world}"


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MERGE = (
    "assign='merge' averages the weights of all experts for every group of tokens, so that weights would travel instead "
    "of tokens: leave these layers whole (DDP or FSDP2 alone)."
)


@dataclass(eq=False)
class _Parcels:
    """What each process is sent: every token once, and the list of its assignments there."""

    token_U: Tensor
    """int64: the tokens sent, process by process."""
    rows_W: Tensor
    pair_A: Tensor
    """int64: (row within the parcel) · L + (expert within the process)."""
    pairs_W: Tensor

    @classmethod
    def of(cls, plan: Plan, local: int, world: int) -> _Parcels:
        expert_A, tokens = plan.expert_A, max(plan.tokens, 1)
        rank_A = torch.div(expert_A, local, rounding_mode="floor")
        # Sorted by process since the plan is sorted by expert; tokens with several experts there become one row.
        key_U, row_A = torch.unique(rank_A * tokens + plan.token_A, return_inverse=True)
        rows_W = torch.bincount(torch.div(key_U, tokens, rounding_mode="floor"), minlength=world)
        start_W = rows_W.cumsum(0) - rows_W
        pair_A = (row_A - start_W[rank_A]) * local + expert_A % local
        return cls(key_U % tokens, rows_W, pair_A, torch.bincount(rank_A, minlength=world))


def _unpack(pair_P: Tensor, weight_P: Tensor, rows: list[int], pairs: list[int], local: int) -> Plan:
    """The plan of what has arrived: rows as tokens, this process's experts as experts."""
    rows_W, pairs_W = torch.tensor([rows, pairs], device=pair_P.device)
    start_P = (rows_W.cumsum(0) - rows_W).repeat_interleave(pairs_W)
    row_P = torch.div(pair_P, local, rounding_mode="floor") + start_P
    return Plan.pairs(row_P, pair_P % local, weight_P, sum(rows), local)


def _averaged(weight: Tensor, world: int) -> Tensor:
    """The weight, with a gradient 1/W as large."""
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return weight
    same = weight.view_as(weight)
    same.register_hook(lambda gradient: gradient / world)
    return same


def parallelise(
    model: nn.Module, mesh: DeviceMesh | dist.ProcessGroup | None = None, *, balance: str = "local"
) -> nn.Module:
    """Spreads the experts of all MoE layers over a group of processes, in place: each keeps E / W of them.

    Every process calls it on the same model (same seed, or a checkpoint loaded on each before or after), then makes its
    optimizer, and gives the model its own tokens; the number of tokens may differ and be 0. Routers, shared experts and
    the rest stay whole on each process and are for DDP or FSDP2 (`expert_parameters` are not). DDP is told.

    Args:
        model: A layer or anything that contains layers.
        mesh: One axis of a mesh, or a group; None is all processes.
        balance: "local": losses, and routers that learn from loads, look at this process's tokens; "global": at
            those of all processes, by one more all-reduce a layer of about 4 E numbers (as GRIN does).

    Raises:
        PumiceError: no process group, a number of processes that does not divide the experts, layers that cannot be
            spread (with the reason) or are already. Nothing has been changed then.
    """
    if balance not in BALANCE:
        raise PumiceError(f"balance={balance!r} is none of {', '.join(BALANCE)}.")
    group, mesh = _group(mesh)
    found = list(layers(model))
    if not found:
        raise PumiceError("the model has no MoE layer (pumice.moe.MoE): there is nothing to spread.")
    for _, layer in found:
        _check(layer, dist.get_world_size(group), balance)
    for place, (name, layer) in enumerate(found):
        exchange = Exchange(group, name, place, mesh)
        layer.experts = ParallelExperts(layer.experts, exchange)
        if balance == "global":
            use_world(layer, exchange)
    _tell_ddp(model)
    return model


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that differ between processes, to be left out of DDP and FSDP2 (`ignored_params`)."""
    return [weight for experts in _spread(model) for weight in experts.parameters()]


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients so that their norm is at most `max_norm`, and returns the norm it was, the same everywhere.

    PyTorch's own would see other experts on each process, scale by different factors, and let the copies of the router
    drift apart. Gradients of the rest must have been averaged (DDP and FSDP2 have).
    """
    spread = {id(weight) for weight in expert_parameters(model)}
    mine = [weight for weight in model.parameters() if id(weight) in spread]
    rest = [weight for weight in model.parameters() if id(weight) not in spread]
    norms = [nn.utils.get_total_norm([w.grad for w in part if w.grad is not None]) for part in (mine, rest)]
    ours, others = (getattr(norm, "full_tensor", lambda norm=norm: norm)().float() for norm in norms)
    exchange = next(_spread(model)).exchange
    ours = exchange.total(ours.to(mine[0].device).square(), "gradient norms")
    norm = (ours + others.to(ours.device).square()).sqrt()
    for part in (mine, rest):
        nn.utils.clip_grads_with_norm_(part, max_norm, norm, foreach=False)
    return norm


def world_statistics(model: nn.Module) -> dict[str, dict[str, float]]:
    """`pumice.moe.statistics` over the tokens of all processes: every process has to call it, after a forward pass."""
    found = {name: layer for name, layer in layers(model) if isinstance(layer.experts, ParallelExperts)}
    plans = {name: layer.plan for name, layer in found.items() if layer.plan is not None}
    with torch.no_grad():
        return {name: WorldPlan(plan, _exchange(found[name])).statistics() for name, plan in plans.items()}


def world_unused(model: nn.Module) -> list[str]:
    """`pumice.moe.unused` over all processes: every process has to call it."""
    names = []
    for name, layer in layers(model):
        if isinstance(layer.experts, ParallelExperts):
            seen_E = _exchange(layer).total(layer.seen_E, "the counts of experts")
            names += [f"{name} expert {expert}".strip() for expert in (seen_E == 0).nonzero().flatten().tolist()]
    return names


def _exchange(layer: MoE) -> Exchange:
    return cast(ParallelExperts, layer.experts).exchange


def _spread(model: nn.Module) -> Iterator[ParallelExperts]:
    return (layer.experts for _, layer in layers(model) if isinstance(layer.experts, ParallelExperts))


def _group(mesh: DeviceMesh | dist.ProcessGroup | None) -> tuple[dist.ProcessGroup, DeviceMesh | None]:
    if not (dist.is_available() and dist.is_initialized()):
        raise PumiceError(
            "the process group is not initialised: start the processes with torchrun and call "
            'torch.distributed.init_process_group("nccl" or "gloo") before parallelise.'
        )
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise PumiceError(f'mesh has {mesh.ndim} axes: give the one to spread experts over, mesh["name"].')
        return mesh.get_group(), mesh
    return (cast(dist.ProcessGroup, dist.group.WORLD) if mesh is None else mesh), None


def _check(layer: MoE, world: int, balance: str) -> None:
    """Refuse what cannot be spread."""
    experts, where = layer.experts, f"MoE layer {layer.name!r}"
    if isinstance(experts, ParallelExperts):
        raise PumiceError(f"{where} is already spread over {experts.exchange.world} processes: call parallelise once.")
    if experts.experts % world:
        fits = [n for n in range(1, experts.experts + 1) if experts.experts % n == 0]
        raise PumiceError(
            f"{where} has {experts.experts} experts, which {world} processes do not divide: use "
            f"{', '.join(map(str, fits))} processes, or a mesh with an axis of that size."
        )
    why = _why_not(layer, experts, balance)
    if why is not None:
        raise PumiceError(f"{where} {why}")


def _why_not(layer: MoE, experts: Experts, balance: str) -> str | None:
    kind = registry.experts.of(experts)
    name = type(experts).__name__ if kind is None else kind.name
    parameters = dict(experts.named_parameters())
    whole = [key for key, weight in parameters.items() if "." in key or weight.shape[:1] != (experts.experts,)]
    if whole or list(experts.buffers()) or type(experts).forward is not Experts.forward:
        return f"has experts of kind={name!r}, which do not lie expert by expert on the first axis: leave it whole."
    if kind is not None and kind.extras["router"] is not None:
        return f"has experts of kind={name!r}, which use what their router computed with all experts: leave it whole."
    router = registry.router.of(layer.router)
    if router is not None and router.extras["kind"] is not None:
        return f"has router={router.name!r}, which looks into the weights of all experts: leave it whole."
    if layer._fact("makes") == "merge":
        return f"cannot be spread: {MERGE}"
    known = {one.name: one for one in registry.balance.members()}
    for loss, _ in layer._weights:
        facts = known[loss].extras if loss in known else {}
        if facts.get("taps"):
            return f"has balance={loss!r}, which watches the experts' hidden states, and those are elsewhere: leave it whole."
        if balance == "global" and facts.get("router") is not None:
            return f"has balance={loss!r}, which reads single tokens from its router: use balance='local'."
    return None


def _tell_ddp(model: nn.Module) -> None:
    """DDP averages and copies neither the experts nor each process's own counts."""
    spread = {id(weight) for weight in expert_parameters(model)}
    spread |= {id(layer.seen_E) for _, layer in layers(model)}
    names = [name for name, one in [*model.named_parameters(), *model.named_buffers()] if id(one) in spread]
    known = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, known + names)
