"""`remove`: take units out of a model for good.

Shapes: U units, n positions of a unit along an axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pumice.core import structure
from pumice.core.errors import PumiceError
from pumice.prune.trace.groups import Group, tensor_of

HEADS = frozenset(
    [
        "num_heads",
        "num_attention_heads",
        "n_heads",
        "n_head",
        "heads",
        "nhead",
        "num_key_value_heads",
        "num_kv_heads",
        "n_kv_heads",
        "all_head_size",
        "inner_dim",
        "split_size",
    ]
)
"""Attributes of attention modules that shrink with the number of heads."""
WIDTHS = frozenset(["intermediate_size", "ffn_dim", "hidden_dim", "inner_dim", "hidden_features", "d_ff", "mlp_dim"])
"""Attributes of feed-forward modules that state the number of their channels."""


def remove(model: nn.Module, group: Group, keep: Tensor | Sequence[int]) -> None:
    """Keep only some units of one group, in place: see `remove_all`.

    Other groups of the model stay valid unless they share an axis with this one (concatenated channels).
    """
    remove_all(model, [(group, keep)])


def remove_all(model: nn.Module, cuts: Sequence[tuple[Group, Tensor | Sequence[int]]]) -> None:
    """Keep only some units of several groups, in place.

    Weights, biases, norms and running statistics are sliced (parameters stay the same objects, gradients are dropped),
    tied weights once; sizes and head counts that modules state follow.

    Args:
        cuts: per group either a bool mask [U] or the indices of the units to keep.

    Raises:
        PumiceError: a mask of the wrong length, an index that does not exist, or nothing left (names the group).
    """
    goes: dict[tuple[str, int], Tensor] = {}
    kept = [(group, as_mask(group, keep)) for group, keep in cuts]
    for group, mask in kept:
        for member in group.members:
            positions = goes.setdefault((member.name, member.axis), torch.zeros(member.size, dtype=torch.bool))
            positions[member.index_Un[~mask].flatten()] = True
    for name, axis in goes:
        size = tensor_of(model, name).shape[axis]
        if size != len(goes[name, axis]):
            raise PumiceError(f"{name} has {size} positions along axis {axis}: it was changed since it was traced.")
    for (name, axis), gone in goes.items():
        if bool(gone.any()):
            tensor = tensor_of(model, name)
            stay = torch.nonzero(~gone).flatten().to(tensor.device)
            structure.resize(tensor, tensor.data.index_select(axis, stay))
    changed = {name.rpartition(".")[0] for group, _ in kept for member in group.members for name in member.names}
    for path in changed:
        structure.refresh(model.get_submodule(path))
    for group, mask in kept:
        _state(model, group, int(mask.sum()))
    structure.note_shapes(model)


def as_mask(group: Group, keep: Tensor | Sequence[int]) -> Tensor:
    """`keep` as a bool mask [U]; PumiceError if it does not fit the group or keeps nothing."""
    given = torch.as_tensor(keep)
    if given.dtype != torch.bool:
        mask = torch.zeros(group.units, dtype=torch.bool)
        if given.numel() and not (int(given.min()) >= 0 and int(given.max()) < group.units):
            raise PumiceError(f"keep={given.tolist()} of {group.name}: it has units 0 to {group.units - 1}.")
        mask[given.long()] = True
        given = mask
    if given.shape != (group.units,):
        raise PumiceError(f"keep of {group.name} has {list(given.shape)} entries for {group.units} units.")
    if not bool(given.any()):
        raise PumiceError(f"nothing would be left of {group.name} ({group.units} units): keep at least one.")
    return given.cpu()


def _state(model: nn.Module, group: Group, kept: int) -> None:
    """Attributes of the modules around the members that state how many units there are."""
    if kept == group.units:
        return
    paths = {name.rpartition(".")[0] for member in group.members for name in member.names}
    around = {path.rsplit(".", depth)[0] for path in paths for depth in range(1, path.count(".") + 1)}
    for path in sorted(around):
        module = model.get_submodule(path)
        for name, value in list(vars(module).items()):
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            if group.kind == "head" and name in HEADS and value * kept % group.units == 0:
                structure.set_attribute(model, path, name, value * kept // group.units)
            elif group.kind == "channel" and name in WIDTHS and value == group.units:
                structure.set_attribute(model, path, name, kept)
