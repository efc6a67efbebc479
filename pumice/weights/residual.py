"""Parts of transformer blocks that structured pruning leaves behind: each replaces a module of the original model.

Shapes: B batch, T tokens, D model width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.calls import hidden_of


class Nothing(nn.Module):
    """Stands where a norm was that nobody reads any more; hands its input on."""

    @classmethod
    def build(cls, old: nn.Module) -> Nothing:
        """Ready to replace `old`."""
        del old
        return cls()

    def forward(self, x: Tensor) -> Tensor:
        return x


class NoAttention(nn.Module):
    """Stands where an attention was: adds nothing to the residual stream.

    It writes keys and values of width zero to the KV cache, which counts the tokens by what its layers hold.
    """

    def __init__(self, layer_idx: int | None) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    @classmethod
    def build(cls, old: nn.Module) -> NoAttention:
        """Ready to replace the attention `old`, at its place in the KV cache."""
        return cls(getattr(old, "layer_idx", None))

    def forward(
        self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if past_key_values is None:
            past_key_values = next((value for value in args if hasattr(value, "get_seq_length")), None)
        if past_key_values is not None and self.layer_idx is not None:
            empty = hidden_states.new_empty(hidden_states.shape[0], 1, hidden_states.shape[1], 0)
            past_key_values.update(empty, empty, self.layer_idx)
        return hidden_states.new_zeros(()), None


class PlainRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), scale and shift lie in the layers that read it.

    Where the stream has fewer values than the `width` it once had, eps counts accordingly (the missing ones are zero); the
    factor sqrt(width / values) between the two means lies in the readers too.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    @classmethod
    def build(cls, old: nn.Module, *, width: int, eps: float) -> PlainRMSNorm:
        """Ready to replace a norm over `width` values."""
        del old
        return cls(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps * self.width / x.shape[-1])

    def extra_repr(self) -> str:
        return f"width={self.width}, eps={self.eps}"


class SlicedBlock(nn.Module):
    """A pre-norm block whose two residual connections are matrices: it may read one basis and write another.

    y = x S₁ᵀ + attention(norm₁(x));  z = y S₂ᵀ + ffn(norm₂(y)).

    Dropout that the original block applies itself is left out. Hidden states of the blocks (`output_hidden_states`) are
    not reported by Transformers, which looks for the original class.
    """

    def __init__(
        self,
        norms: Sequence[nn.Module],
        attention: nn.Module,
        ffn: nn.Module,
        shortcuts: Sequence[nn.Linear],
        arguments: Sequence[str],
    ) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = norms
        self.attention, self.ffn = attention, ffn
        self.shortcut_1, self.shortcut_2 = shortcuts
        self.arguments = tuple(arguments)
        """Names of the arguments that the model hands over by position."""
        taken = inspect.signature(attention.forward).parameters
        self._all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values())
        self._taken = frozenset(taken)

    @classmethod
    def build(
        cls, old: nn.Module, *, attention: str, ffn: Sequence[str], width: int, eps: Sequence[float]
    ) -> SlicedBlock:
        """Take over the attention and FFN of the block `old`.

        Args:
            attention, ffn: names of its children; those of the FFN run one after the other.
            width: of the stream before anything is sliced.
            eps: of the two norms.
        """
        steps = [old.get_submodule(name) for name in ffn]
        like = next(old.parameters())
        options: dict[str, Any] = {"bias": False, "dtype": like.dtype, "device": like.device}
        new = cls(
            [PlainRMSNorm(width, one) for one in eps],
            old.get_submodule(attention),
            steps[0] if len(steps) == 1 else nn.Sequential(*steps),
            [nn.Linear(width, width, **options) for _ in eps],
            list(inspect.signature(old.forward).parameters),
        )
        return new.train(old.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        x = given.pop(self.arguments[0])
        if not self._all:
            given = {name: value for name, value in given.items() if name in self._taken}
        y = self.shortcut_1(x) + hidden_of(self.attention(self.norm_1(x), **given))
        return self.shortcut_2(y) + self.ffn(self.norm_2(y))
