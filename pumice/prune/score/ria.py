"""Relative importance and activations."""

from typing import Annotated

from torch import Tensor

from pumice.core.registry import scorer
from pumice.core.stats import Stats


@scorer("ria", simpler="wanda", paper="Zhang et al., ICLR 2024 (Plug-and-Play)", needs=("input_sqnorm",))
def ria(
    w_OI: Tensor, stats: Stats, *, power: Annotated[float, "power of the input norm; 0 looks at weights only"] = 0.5
) -> Tensor:
    """(|W|/Σrow|W| + |W|/Σcolumn|W|)·‖X‖^½: weights relative to their output and their input, so no channel dies (RIA).

    Compared over the whole layer by default, as the relative weights of different outputs are alike in size. The
    formula agrees with the authors' published code. With a grouped convolution the column sum runs over all groups.
    """
    size = w_OI.abs()
    relative = size / size.sum(1, keepdim=True).clamp(min=1e-30) + size / size.sum(0).clamp(min=1e-30)
    return relative * stats["input_sqnorm"].sqrt().pow(power)
