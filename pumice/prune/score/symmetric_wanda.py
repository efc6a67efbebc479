"""Symmetric Wanda."""

from typing import Annotated

from torch import Tensor

from pumice.core.registry import scorer
from pumice.core.stats import Stats


@scorer("symmetric-wanda", simpler="wanda", paper="arXiv:2501.18980", needs=("input_sqnorm", "output"))
def symmetric_wanda(
    w_OI: Tensor, stats: Stats, *, share: Annotated[float, "weight of the output norm beside the input norm"] = 1.0
) -> Tensor:
    """|W|·(‖X‖ + ‖Y‖): a weight matters by the input that it reads and by the output that it writes.

    It is exactly what losing one weight alone adds to the paper's objective ‖X(W'−W)‖ + ‖(W'−W)Y‖. `share=0` is Wanda,
    compared over the whole layer.

    The objective was checked (the paper's published reviews quote it), the paper's own table of scores was not. Doubt:
    what calibrates the output side; in a special case of the paper Y is made of the weights, and it shows no results for
    the general one. Here Y is what the dense layer gives (without bias) for a sample of its inputs, both norms per token.

    On stories15M at 50 % it is behind Wanda and RIA (docs/quality.md): it has not earned its keep yet.
    """
    output = stats["output"].square().mean(-2).flatten().sqrt()
    return w_OI.abs() * (stats["input_sqnorm"].sqrt() + share * output[:, None])
