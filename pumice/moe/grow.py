"""More experts, or fewer, while a layer is trained.

Parameters are replaced by new ones of another size: give the optimizer the layer's parameters again afterwards.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.moe.experts.base import Experts
from pumice.moe.layer import MoE
from pumice.moe.route.top_any import TopAny


def resized(experts: Experts, weights: dict[str, Tensor]) -> Experts:
    """A copy of the experts with these parameters in place of their own, `{name: [E', …]}`."""
    other = copy.deepcopy(experts)
    for name, weight in weights.items():
        setattr(other, name, nn.Parameter(weight.detach().clone()))
    other.experts = next(iter(weights.values())).shape[0]
    return other


def spawn(experts: Experts, count: int, *, masked: float = 0.2, generator: torch.Generator | None = None) -> Experts:
    """`count` copies of one trained expert, each with other weights set to 0: how EvoMoE's experts begin.

    Train a layer with `experts=1`, then make the next one with `MoE(d_model, d_ff, experts=spawn(layer.experts, 8))`.

    Args:
        experts: With one expert.
        count: Experts to make.
        masked: Share of each matrix's weights that a copy loses, drawn for each copy; biases stay. The paper's value is
            not known to us.

    Raises:
        PumiceError: more than one expert to copy, or a share outside [0, 1).
    """
    if experts.experts != 1:
        raise PumiceError(f"experts={experts.experts}: spawn copies one expert.")
    if not 0 <= masked < 1 or count < 1:
        raise PumiceError(f"masked={masked} must be in [0, 1) and count={count} at least 1.")
    copies = {}
    for name, weight in experts.weights().items():
        many = weight.detach().expand(count, *weight.shape[1:])
        if weight.dim() > 2:
            drawn = torch.rand(many.shape, generator=generator, device=weight.device)
            many = many * (drawn >= masked)
        copies[name] = many
    return resized(experts, copies)


@torch.no_grad()
def tune(layer: MoE) -> tuple[list[int], int]:
    """DynMoE's change of the number of experts: remove the idle ones, add one if tokens had none.

    Idle are those without a token since `layer.reset_seen()`, which this calls at its end, as are the counts of missed
    tokens. At least one expert stays. The new expert is the mean of those that stay; the paper does not tell us more.

    Returns:
        The experts removed, and how many were added (0 or 1).

    Raises:
        PumiceError: a router other than `top_any`.
    """
    router = layer.router
    if not isinstance(router, TopAny):
        raise PumiceError(f"router={type(router).__name__}: only 'top_any' says which tokens want another expert.")
    removed = layer.unused()
    if len(removed) == layer.experts.experts:
        removed = removed[1:]
    kept = [one for one in range(layer.experts.experts) if one not in removed]
    kept_N = torch.tensor(kept, device=layer.seen_E.device)
    added = int(router.tuned(kept_N))
    if removed or added:
        weights = {name: weight[kept_N] for name, weight in layer.experts.weights().items()}
        if added:
            weights = {name: torch.cat([weight, weight.mean(0, keepdim=True)]) for name, weight in weights.items()}
        layer.experts = resized(layer.experts, weights)
        layer.seen_E = layer.seen_E.new_zeros(layer.experts.experts)
    layer.reset_seen()
    layer.plan = None
    return removed, added
