"""One threshold for the whole model."""

from typing import Annotated

from pumice.core.registry import allocation
from pumice.prune.allocate.base import Layers, by_threshold


@allocation("global", key="global-mp", paper="arXiv:2209.14624", compares_score=True)
def global_(
    layers: Layers, density: float, *, minimum: Annotated[float, "least density of any layer"] = 0.02
) -> dict[str, float]:
    """All weights of the model compete by the recipe's score; no layer falls under `minimum` (Global MP's guard).

    With magnitude this is Global MP. The paper counts the guard in weights, here it is a share of the layer.
    """
    return by_threshold(layers, density, layers.score, minimum)
