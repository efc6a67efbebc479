"""`trace`: run a model once on a small input and read off which rows and columns belong together."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pumice.core.calls import call_model, tensors
from pumice.core.stats import evaluating
from pumice.core.stream import block_lists
from pumice.prune.trace.cut import remove_all
from pumice.prune.trace.groups import Group, Member
from pumice.prune.trace.labels import Lab
from pumice.prune.trace.operators import Watch
from pumice.prune.trace.rules import Rules

TOKENS = 12
"""A sequence is cut to so many tokens: what belongs together does not depend on its length."""


WHOLE = "all of it belongs together"
"""Why nothing is taken from what is one unit."""


@dataclass
class Traced:
    """The groups of a model and what is left alone.

    Args:
        left: name of a tensor (with its axis) -> why nothing can be taken from it.
        unknown: ATen operators without a rule that the model called.
        unreached: matrices and kernels that the example never came to; nothing is taken from them.
    """

    groups: list[Group]
    left: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)


@dataclass
class _Leaf:
    """An axis of a tensor of the model; its ids are first .. first + size."""

    names: tuple[str, ...]
    axis: int
    first: int
    size: int


def trace(model: nn.Module, example: Any, *, check: bool = True) -> list[Group]:
    """The groups of coupled channels, heads and KV groups of a model, in the order of its modules.

    The model runs once, in eval mode, on one sample of `example` (a batch as it takes them, tokens cut to a few). Every
    element of every activation carries the row of the weight that made it; additions, norms, convolutions and attention
    join the rows that meet. What meets the model's inputs, outputs, values that no weight made, or an operator without
    a rule stays. With `check`, units are taken from a copy without memory and the copy must still run; a group for which
    it does not is left out.

    Raises:
        Exception: whatever the model raises on the example.
    """
    return explore(model, example, check=check).groups


def explore(model: nn.Module, example: Any, *, check: bool = True) -> Traced:
    """`trace`, and why the rest is left alone."""
    example = sample(example)
    rules = Rules()
    leaves = _label_weights(model, rules)
    watch = Watch(rules)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), evaluating(model), watch:
            output = call_model(model, example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    for tensor in tensors(output):
        lab = rules.of(tensor)
        for coord in lab.coords if lab is not None else ():
            rules.classes.pin(coord, "the model returns it")
    for label in rules.views:
        if len(rules.classes.root_axes(label)) > 1:
            rules.classes.pin(label, "a view splits it so that its units are no whole rows")
    groups, left = _assemble(model, rules, leaves)
    if check:
        groups, refused = _checked(model, example, groups)
        left |= refused
    unreached = [name for name, weight in model.named_parameters() if weight.dim() > 1 and id(weight) not in watch.seen]
    return Traced(groups, left, sorted(watch.unknown), unreached)


def sample(batch: Any) -> Any:
    """The first sample of a batch, token sequences cut short; labels are left out."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        value = value[:1]
        return value[:, :TOKENS] if value.dim() == 2 and not value.is_floating_point() else value

    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items() if key != "labels"}
    if isinstance(batch, list | tuple):
        return type(batch)(cut(value) for value in batch)
    return cut(batch)


def _label_weights(model: nn.Module, rules: Rules) -> list[_Leaf]:
    """Ids for every axis of every parameter, and of the statistics of batch norms."""
    names: dict[int, list[str]] = {}
    found: dict[int, Tensor] = {}
    closed: set[int] = set()
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(prefix=prefix, recurse=False, remove_duplicate=False))
        if isinstance(module, nn.modules.batchnorm._NormBase):
            own |= dict(module.named_buffers(prefix=prefix, recurse=False))  # type: ignore[arg-type]
        for name, tensor in own.items():
            names.setdefault(id(tensor), []).append(name)
            found[id(tensor)] = tensor
        if isinstance(module, nn.MultiheadAttention):
            closed |= {id(parameter) for parameter in module.parameters()}
    leaves = []
    for key, tensor in found.items():
        coords = []
        for axis, size in enumerate(tensor.shape):
            if size < 2:
                continue
            ids = rules.classes.new(size)
            leaves.append(_Leaf(tuple(names[key]), axis, int(ids[0]), size))
            coords.append(ids.view([-1 if a == axis else 1 for a in range(tensor.dim())]).expand(tensor.shape))
            if key in closed:
                rules.classes.pin(ids, "nn.MultiheadAttention computes its head size from its width")
        rules.set(tensor, Lab(coords, True))
    return leaves


def _assemble(model: nn.Module, rules: Rules, leaves: Sequence[_Leaf]) -> tuple[list[Group], dict[str, str]]:
    """Classes of the same make as groups."""
    classes = rules.classes
    reasons = classes.pinned()
    roots = classes.find(torch.arange(len(classes.parent)))
    of_leaf = torch.zeros(len(roots), dtype=torch.long)
    for index, leaf in enumerate(leaves):
        of_leaf[leaf.first : leaf.first + leaf.size] = index
    left: dict[str, str] = {}
    order = torch.argsort(roots[1:], stable=True) + 1
    _, counts = torch.unique_consecutive(roots[order], return_counts=True)
    made, used = classes.made, classes.used
    heads = _heads(rules)
    alike: dict[Any, list[Tensor]] = {}
    for ids in torch.split(order, counts.tolist()):
        root, where = int(roots[ids[0]]), of_leaf[ids]
        if root in reasons:
            for index in where.unique().tolist():
                left.setdefault(f"{leaves[index].names[0]} axis {leaves[index].axis}", reasons[root])
        elif bool(made[ids].any()) and bool(used[ids].any()):
            alike.setdefault((heads.get(root, 0), tuple(where.tolist())), []).append(ids)
    groups = []
    blocks = [name for name, _ in block_lists(model)]
    for (count, where), units in alike.items():
        ids_Un = torch.stack(units)
        members = []
        for index in sorted(set(where)):
            leaf = leaves[index]
            at = [i for i, one in enumerate(where) if one == index]
            own = ids_Un[:, at]
            roles = [role for role, flags in (("out", made), ("in", used)) if bool(flags[own].any())]
            role = "both" if len(roles) == 2 else roles[0] if roles else "own"
            members.append(Member(leaf.names, leaf.axis, own - leaf.first, role, leaf.size))
        if len(units) > 1:
            groups.append(_group(members, len(units), count, blocks))
        else:
            for member in members:
                left.setdefault(f"{member.name} axis {member.axis}", WHOLE)
    return _in_order(model, groups), left


def _heads(rules: Rules) -> dict[int, int]:
    """Root -> query heads in its class."""
    found: dict[int, int] = {}
    for label in rules.heads:
        distinct = label.unique()
        for root, count in zip(*rules.classes.find(distinct).unique(return_counts=True), strict=True):
            found[int(root)] = max(found.get(int(root), 0), int(count))
    return found


def _group(members: list[Member], units: int, heads: int, blocks: Sequence[str]) -> Group:
    reader = next((one for one in members if one.role in ("in", "both")), members[0])

    def block_of(name: str) -> str | None:
        return next((one for one in blocks if name.startswith(f"{one}.")), None)

    inside = {block_of(name) for member in members for name in member.names}
    block = inside.pop() if len(inside) == 1 else None
    return Group(reader.module, "head" if heads else "channel", units, tuple(members), heads, block)


def _in_order(model: nn.Module, groups: list[Group]) -> list[Group]:
    place = {name: index for index, (name, _) in enumerate(model.named_modules())}
    groups = sorted(groups, key=lambda group: place[group.name])
    seen: dict[str, int] = {}
    for index, group in enumerate(groups):
        # Several groups may share a reader (a concatenation).
        seen[group.name] = seen.get(group.name, 0) + 1
        if seen[group.name] > 1:
            groups[index] = replace(group, name=f"{group.name}:{seen[group.name]}")
    return groups


def bare(model: nn.Module) -> nn.Module:
    """A copy of a model whose tensors have shapes but no memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _checked(model: nn.Module, example: Any, groups: list[Group]) -> tuple[list[Group], dict[str, str]]:
    """The groups without those that the model does not run without a unit of."""
    attempt = _on_meta if _runs(lambda: _on_meta(model, example, [])) else _on_copy
    good: list[Group] = []
    refused: dict[str, str] = {}
    for part in _halves(groups, lambda some: attempt(model, example, some)):
        if isinstance(part, Group):
            for member in part.members:
                refused[f"{member.name} axis {member.axis}"] = "the model does not run with a unit less"
        else:
            good += part
    return [group for group in groups if group in good], refused


def _halves(groups: list[Group], attempt: Any) -> Iterator[list[Group] | Group]:
    """Lists of groups with which the attempt succeeds, and the single ones with which it does not."""
    if not groups or _runs(lambda: attempt(groups)):
        yield groups
    elif len(groups) == 1:
        yield groups[0]
    else:
        middle = len(groups) // 2
        yield from _halves(groups[:middle], attempt)
        yield from _halves(groups[middle:], attempt)


def _runs(attempt: Any) -> bool:
    try:
        attempt()
    except Exception:
        # Any exception of the model's own code means the same: it does not run like this.
        return False
    return True


def _on_meta(model: nn.Module, example: Any, groups: Sequence[Group]) -> None:
    _without_one(bare(model), _meta(example), groups)


def _on_copy(model: nn.Module, example: Any, groups: Sequence[Group]) -> None:
    _without_one(copy.deepcopy(model), example, groups)


def _without_one(model: nn.Module, example: Any, groups: Sequence[Group]) -> None:
    remove_all(model, [(group, torch.arange(group.units) > 0) for group in groups])
    with torch.no_grad(), evaluating(model):
        call_model(model, example)


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, Mapping):
        return {key: _meta(one) for key, one in value.items()}
    return type(value)(map(_meta, value)) if isinstance(value, list | tuple) else value
