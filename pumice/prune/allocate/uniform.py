"""The same density everywhere."""

from pumice.core.registry import allocation
from pumice.prune.allocate.base import Layers


@allocation("uniform")
def uniform(layers: Layers, density: float) -> dict[str, float]:
    """Every layer gets the density that was asked for."""
    return {view.name: density for view in layers.views}
