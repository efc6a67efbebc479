"""The mode that watches a model run and applies the rule of every ATen operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pumice.core.calls import tensors
from pumice.prune.trace.labels import FIXED, Lab, spans
from pumice.prune.trace.names import ATTENTION, BATCH_NORMS, MOVES, REDUCES, SAME, SPATIAL
from pumice.prune.trace.rules import Rules

Arguments = dict[str, Any]


class Watch(TorchDispatchMode):
    """Labels every tensor of a forward pass; operators without a rule pin what goes into them."""

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        self.unknown: set[str] = set()
        self.seen: set[int] = set()
        """Ids of the tensors that went into an operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given_in = list(tensors([list(args), kwargs]))
        self.seen.update(map(id, given_in))
        before = [self.rules.of(one) for one in given_in]
        out = func(*args, **kwargs)
        outputs = list(tensors(out))
        if outputs and any(lab is not None for lab in before):
            given = {one.name: one.default_value for one in func._schema.arguments}
            given |= dict(zip(given, args, strict=False)) | kwargs
            self._label(func, given, outputs)
        return out

    def _label(self, func: Any, given: Arguments, outputs: list[Tensor]) -> None:
        name = func._schema.name.split("::")[1]
        name = name.rstrip("_") if name not in ("copy_",) else name
        if name in MOVES:
            self._move(func, name, given, outputs)
            return
        rule = _RULES.get(name)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = _pointwise
        label = self._unknown(func, given) if rule is None else rule(self.rules, given, outputs)
        labels = label if isinstance(label, list) else [label]
        for output, one in zip(outputs, labels, strict=False):
            if one is not None:
                self.rules.set(output, one if isinstance(one, Lab) else Lab([one]))

    def _unknown(self, func: Any, given: Arguments) -> None:
        name = str(func).removeprefix("aten.")
        for tensor in tensors(list(given.values())):
            lab = self.rules.of(tensor)
            for coord in lab.coords if lab is not None else ():
                self.unknown.add(name)
                self.rules.classes.pin(coord, f"operator {name} is not followed")

    def _move(self, func: Any, name: str, given: Arguments, outputs: list[Tensor]) -> None:
        source = next(iter(given.values()))
        lab = self.rules.of(source)
        if lab is None:
            return
        rest = dict(list(given.items())[1:])
        reshapes = "view" in name or "reshape" in name
        moved = []
        for coord in lab.coords:
            found = coord.reshape(outputs[0].shape) if reshapes else func(coord, **rest)
            moved.append(list(found) if isinstance(found, list | tuple) else [found])
        for index, output in enumerate(outputs):
            coords = [each[index] for each in moved]
            self.rules.set(output, Lab(coords, lab.weight))
            if reshapes and not lab.weight:
                self.rules.views += [coord for coord in coords if len(self.rules.classes.axes(coord)) > 1]


def _pointwise(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    operands = list(tensors(list(given.values())))
    labs = [rules.of(one) for one in operands]
    weights = [lab for lab in labs if lab is not None]
    if all(lab.weight for lab in weights) and len(weights) == 1:
        # Arithmetic on a weight alone (a scale, a mask) leaves both of its axes.
        source = operands[labs.index(weights[0])]
        if source.shape == outputs[0].shape:
            for other in operands:
                if other is not source and other.numel() > 1:
                    for coord in weights[0].coords:
                        rules.pointwise_constant(coord, other)
            return weights[0]
    label = rules.pointwise(operands, outputs[0].shape)
    return [label for _ in outputs]


def _same(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    lab = rules.of(next(iter(given.values())))
    return [lab if lab is None or out.shape == lab.coords[0].shape else None for out in outputs]


def _reduce(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    label = rules.activation(next(iter(given.values())))
    if label is None:
        return None
    axes = given.get("dim")
    axes = [] if axes is None else [axes] if isinstance(axes, int) else list(axes)
    found = rules.reduced(label, axes, bool(given.get("keepdim")))
    return [found if found is not None and found.shape == out.shape else None for out in outputs]


def _spatial(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    label = rules.activation(next(iter(given.values())))
    if label is None:
        return None
    changed = [axis for axis in range(label.dim()) if label.size(axis) != outputs[0].size(axis) or axis > 1]
    if set(changed) & set(rules.classes.axes(label)):
        rules.classes.pin(label, "it is pooled over its channels")
        return None
    for axis in changed:
        label = label.narrow(axis, 0, 1)
    return [label.expand(outputs[0].shape) for _ in outputs]


def _linear(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    x, weight = (given[key] for key in (("input", "weight") if "weight" in given else ("self", "mat2")))
    lab = rules.of(weight)
    if lab is not None and "weight" in given:
        lab = Lab([coord.t() for coord in lab.coords], True)
    if lab is not None and len(lab.coords) == 1 and not lab.weight:
        return _both_activations(rules, given, x, weight, outputs[0])
    label = rules.contract(rules.activation(x), lab, outputs[0].shape)
    return _add(rules, outputs[0], label, given.get("bias"))


def _both_activations(rules: Rules, given: Arguments, x: Tensor, y: Tensor, out: Tensor) -> Any:
    a, b = rules.activation(x), rules.activation(y)
    found = rules.batched(
        None if a is None else a.unsqueeze(0), None if b is None else b.unsqueeze(0), torch.Size((1, *out.shape))
    )
    return None if found is None else found.squeeze(0)


def _addmm(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    label = _linear(rules, {"self": given["mat1"], "mat2": given["mat2"]}, outputs)
    return _add(rules, outputs[0], label, given["self"])


def _add(rules: Rules, out: Tensor, label: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return label
    rules.set(out, None if label is None else Lab([label]))
    return rules.pointwise([out, bias], out.shape)


def _bmm(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    keys = ("batch1", "batch2") if "batch1" in given else ("self", "mat2")
    x, y = (given[key] for key in keys)
    lab = rules.of(y)
    if lab is not None and lab.weight and not any(spans(coord, 0) for coord in lab.coords) and y.stride(0) == 0:
        label = rules.contract(rules.activation(x), Lab([coord[0] for coord in lab.coords], True), outputs[0].shape)
    else:
        for one in (x, y):
            weight = rules.of(one)
            for coord in weight.coords if weight is not None and weight.weight else ():
                rules.classes.pin(coord, "a batch of weights")
        label = rules.batched(rules.activation(x), rules.activation(y), outputs[0].shape)
    return _add(rules, outputs[0], label, given.get("self") if "batch1" in given else None)


def _attention(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    q, k, v = (rules.activation(given[key]) for key in ("query", "key", "value"))
    found = rules.attention(q, k, v, outputs[0].shape)
    mask = next((given[key] for key in ("attn_mask", "attn_bias") if isinstance(given.get(key), Tensor)), None)
    if mask is not None and found is not None and mask.dim() == 4:
        # The mask has the scores' shape: a bias per head belongs to the head.
        bias = rules.activation(mask)
        if bias is not None:
            rules.classes.union(found[:1, :, :1, :1], bias[:1, :, :1, :1])
        elif mask.size(1) > 1 and mask.stride(1):
            rules.classes.join(found, [1])
    return found


def _convolution(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    shape, weight = outputs[0].shape, given["weight"]
    x, transposed = rules.activation(given["input"]), bool(given.get("transposed"))
    label = rules.convolution(x, rules.of(weight), transposed, given.get("groups", 1), shape)
    return _channelwise(rules, label, [given.get("bias")], shape)


def _channelwise(rules: Rules, label: Tensor | None, vectors: Sequence[Tensor | None], shape: torch.Size) -> Any:
    """Vectors over axis 1 join its channels."""
    for vector in vectors:
        lab = rules.of(vector)
        if lab is None or vector is None:
            if label is not None and vector is not None and vector.numel() > 1:
                rules.classes.join(label, [1])
            continue
        own = lab.coords[0].view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
        label = own if label is None else rules._meet(label, own, lab.weight)
    return label


def _batch_norm(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    vectors = [given.get(key) for key in ("weight", "bias", "running_mean", "running_var")]
    shape = outputs[0].shape
    return _channelwise(rules, rules.activation(given["input"]), vectors, shape)


def _layer_norm(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    rules.normalised(given["input"], len(given["normalized_shape"]))
    operands = [given["input"], given.get("weight"), given.get("bias")]
    return rules.pointwise([one for one in operands if one is not None], outputs[0].shape)


def _group_norm(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    label, groups = rules.activation(given["input"]), int(given["group"])
    if label is not None and groups > 1:
        channels = label.transpose(0, 1).flatten(1)[:, 0].view(groups, -1)
        rules.classes.union(channels, channels[:, :1])
    return _channelwise(rules, label, [given.get("weight"), given.get("bias")], outputs[0].shape)


def _embedding(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    lab = rules.of(given["weight"])
    if lab is None:
        return None
    label = None
    for coord in lab.coords:
        if coord.stride(0):
            rules.classes.pin(coord, "rows of a table")
        else:
            label = coord[0]
            rules.classes.made[label] = True
    return None if label is None else label.expand(outputs[0].shape)


def _index(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    source: Tensor = given["self"]
    indices: Any = given.get("indices", given.get("index"))
    lab = rules.of(source)
    if lab is None:
        return None
    axes = [given["dim"]] if "dim" in given else [i for i, one in enumerate(indices) if one is not None]
    coords = []
    for coord in lab.coords:
        if any(axis % coord.dim() in rules.classes.axes(coord) for axis in axes):
            rules.classes.pin(coord, "it is picked by index")
        coords.append(
            torch.index_select(coord, given["dim"], indices)
            if "dim" in given
            else coord[tuple(slice(None) if one is None else one for one in indices)]
        )
    return Lab(coords, lab.weight)


def _pad(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    label = rules.activation(given["self"])
    if label is None:
        return None
    along, pads = rules.classes.axes(label), list(given["pad"])
    for axis in range(label.dim()):
        if axis not in along:
            label = label.narrow(axis, 0, 1)
            at = 2 * (label.dim() - 1 - axis)
            pads[at : at + 2] = [0, 0][: len(pads[at : at + 2])]
    return torch.nn.functional.pad(label, pads, value=FIXED).expand(outputs[0].shape)


def _cat(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    found = [one for one in given["tensors"] if one.numel() or one.dim() > 1]
    return rules.joined(found, given.get("dim") or 0)


def _stack(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    axis = (given.get("dim") or 0) % outputs[0].dim()
    labels = [rules.activation(one) for one in given["tensors"]]
    present = [label for label in labels if label is not None]
    if len(present) < len(labels):
        for label in present:
            rules.classes.pin(label, "it is stacked on values that no weight made")
        return None
    return torch.stack(present, axis)


def _copy(rules: Rules, given: Arguments, outputs: list[Tensor]) -> Any:
    target, source = given["self"], given["src"]
    if rules.of(target) is None:
        label = rules.activation(source)
        if label is not None:
            rules.classes.pin(label, "it is written into a tensor made beforehand")
        return None
    return rules.pointwise([target, source], outputs[0].shape)


Found = Callable[[Rules, Arguments, list[Tensor]], Any]
_RULES: dict[str, Found] = {
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(REDUCES, _reduce),
    **dict.fromkeys(SPATIAL, _spatial),
    **dict.fromkeys(ATTENTION, _attention),
    **dict.fromkeys(BATCH_NORMS, _batch_norm),
    **dict.fromkeys(("index", "index_select"), _index),
    **dict.fromkeys(("convolution", "_convolution", "mkldnn_convolution"), _convolution),
    **dict.fromkeys(("linear", "mm"), _linear),
    **dict.fromkeys(("bmm", "baddbmm"), _bmm),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), _layer_norm),
    "native_group_norm": _group_norm,
    "addmm": _addmm,
    "embedding": _embedding,
    "constant_pad_nd": _pad,
    "cat": _cat,
    "stack": _stack,
    "copy_": _copy,
    "masked_fill": _pointwise,
}
