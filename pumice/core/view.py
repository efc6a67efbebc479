"""One view on every prunable weight, whatever module it sits in.

Shapes: O outputs, I inputs (of one group of a grouped convolution, kernel positions included), E experts.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError

DEFAULT_IGNORE = ("lm_head", "embed*")


@dataclass
class WeightView:
    """A prunable weight as the matrix w_OI that every scorer, recovery and pattern works on.

    `Linear`, `Conv1d`/`Conv2d` (kernel positions belong to the inputs), GPT-2's transposed `Conv1D` and single experts
    of fused 3-D tensors all look the same from here. `read` gives a float32 copy, `write` changes the parameter in
    place and casts to its dtype.
    """

    name: str
    """`<module>.<parameter>`, with `.<expert>` behind it for one expert of a fused tensor."""
    module_name: str
    module: nn.Module = field(repr=False)
    parameter: str = "weight"
    expert: int | None = None
    transposed: bool = False
    groups: int = 1

    @property
    def tensor(self) -> Tensor:
        """The parameter itself (all experts of a fused one)."""
        return getattr(self.module, self.parameter)

    @property
    def shape_OI(self) -> tuple[int, int]:
        shape = self.tensor.shape[1:] if self.expert is not None else self.tensor.shape
        o, i = shape[0], shape[1:].numel()
        return (i, o) if self.transposed else (o, i)

    @property
    def numel(self) -> int:
        o, i = self.shape_OI
        return o * i

    def matrix(self) -> Tensor:
        """w_OI in the parameter's own dtype, sharing its memory where the storage order allows it."""
        return self.as_matrix(self.tensor.detach())

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape (its gradient, say) as a matrix [O, I] of this view."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        tensor = tensor.flatten(1)
        return tensor.t() if self.transposed else tensor

    def read(self) -> Tensor:
        """w_OI as a float32 copy; PumiceError naming the layer if it holds NaN or Inf."""
        w = self.matrix().to(torch.float32, copy=True)
        if not torch.isfinite(w).all():
            bad = int((~torch.isfinite(w)).sum())
            raise PumiceError(
                f"layer {self.name} holds {bad} NaN or Inf weights: repair the checkpoint or ignore the layer."
            )
        return w

    def bias(self) -> Tensor:
        """What the layer adds to its outputs, [O] in float32; zeros where it has no bias, and for fused experts."""
        bias = getattr(self.module, "bias", None) if self.expert is None else None
        shape = self.shape_OI[0]
        if not isinstance(bias, Tensor) or bias.shape != (shape,):
            return torch.zeros(shape, device=self.tensor.device)
        return bias.detach().float()

    def write(self, w_OI: Tensor) -> None:
        """Put w_OI into the parameter, in place."""
        target = self.tensor.detach()
        if self.expert is not None:
            target = target[self.expert]
        if self.transposed:
            w_OI = w_OI.t()
        target.copy_(w_OI.reshape(target.shape))


def _is_transposed_linear(module: nn.Module) -> bool:
    # GPT-2's Conv1D keeps its weight as [in, out]; told by name so that transformers need not be imported.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _expert_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and "proj" in name and "bias" not in name and hasattr(module, "num_experts"):
            yield name, parameter


def module_views(name: str, module: nn.Module) -> list[WeightView]:
    """Views of one module's own weights (not of its children)."""
    prefix = f"{name}." if name else ""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and getattr(module, "weight", None) is not None:
        return [WeightView(f"{prefix}weight", name, module, groups=getattr(module, "groups", 1))]
    if _is_transposed_linear(module):
        return [WeightView(f"{prefix}weight", name, module, transposed=True)]
    transposed = bool(getattr(module, "is_transposed", False))
    return [
        WeightView(f"{prefix}{key}.{expert}", name, module, key, expert, transposed)
        for key, parameter in _expert_parameters(module)
        for expert in range(parameter.shape[0])
    ]


def _regular_expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern[3:])
    except re.error as error:
        raise PumiceError(f"pattern {pattern!r} is no regular expression: {error}.") from None


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted module name fits one of the patterns.

    A pattern is a shell wildcard held against the whole name, each of its components and each of its endings; with
    `re:` before it, a regular expression searched in the name.
    """
    parts = name.split(".")
    candidates = {name, *parts, *(".".join(parts[i:]) for i in range(len(parts)))}
    for wanted in patterns:
        if wanted.startswith("re:"):
            if _regular_expression(wanted).search(name):
                return True
        elif any(fnmatch.fnmatchcase(candidate, wanted) for candidate in candidates):
            return True
    return False


def _identity(view: WeightView) -> tuple[int, int | None]:
    return id(view.tensor), view.expert


def find_views(
    model: nn.Module, targets: Iterable[str] | str | None = None, ignore: Iterable[str] | str = DEFAULT_IGNORE
) -> list[WeightView]:
    """Every prunable weight of a model, tied weights once, in module order.

    Args:
        model: any module.
        targets: patterns of module names to prune (see `matches`), or one; None means all.
        ignore: patterns of module names to leave dense, or one; wins over `targets`, also for weights tied to them.

    Raises:
        PumiceError: nothing is left to prune, or a target pattern fits no prunable layer.
    """
    found: list[WeightView] = []
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    # A lone text is one pattern, not a sequence of letters.
    wanted = [targets] if isinstance(targets, str) else None if targets is None else list(targets)
    left = [ignore] if isinstance(ignore, str) else list(ignore)
    by_module = {name: module_views(name, module) for name, module in model.named_modules()}
    names = [name for name, views in by_module.items() if views]
    # A weight that is tied to an ignored layer would change that layer too.
    seen = {_identity(view) for name in names if matches(name, left) for view in by_module[name]}
    for name in names:
        if wanted is not None and not matches(name, wanted):
            continue
        for view in by_module[name]:
            if _identity(view) in seen or (id(view.tensor) in embeddings and wanted is None):
                continue
            seen.add(_identity(view))
            found.append(view)
    for pattern in wanted or ():
        if not any(matches(name, [pattern]) for name in names):
            raise PumiceError(
                f"targets={pattern!r} fits no prunable layer; layer names look like {', '.join(names[:3]) or '(none)'}."
            )
    if not found:
        raise PumiceError(
            f"the model {type(model).__name__} has no layer to prune: targets={wanted}, ignore={left}, "
            f"prunable layers it has: {', '.join(names[:5]) or 'none (only Linear, Conv1d/2d, Conv1D and fused experts count)'}."
        )
    return found
