"""Wanda."""

from torch import Tensor

from pumice.core.registry import scorer
from pumice.core.stats import Stats


@scorer("wanda", paper="arXiv:2306.11695", needs=("input_sqnorm",), scope="row")
def wanda(w_OI: Tensor, stats: Stats) -> Tensor:
    """|W|·‖X‖: a weight matters as much as the input it multiplies; compared within each output row."""
    return w_OI.abs() * stats["input_sqnorm"].sqrt()
