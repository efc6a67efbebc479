"""COMET: decision trees whose branches close completely.

Legend: T tokens, D model width, E experts (leaves), K trees, N inner nodes.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.core.registry import router
from pumice.moe.route.base import Router
from pumice.moe.route.dselect_k import mean_entropy, smooth_step
from pumice.moe.routing import RouteContext, Routing


@router("comet", key="comet", paper="arXiv:2306.02824")
class Comet(Router):
    """k binary trees with the experts as leaves: a node sends the share S(w x) of its mass left, the rest right.

    S is the smooth-step function, exactly 0 or 1 outside an interval, so that a saturated tree ends in one leaf and the
    gate has at most k experts. The weights are a softmax over all leaves of all trees of a_ke(x) + log p_ke(x), p the
    mass that reaches the leaf and a linear; a leaf without mass has weight 0. `entropy · mean_t Σ_k H(p_k)` drives
    trees to one leaf. Go with `assign="threshold"`, and inside `router="permuted"` for the paper's local search over
    permutations of the experts. Any number of experts: the trees are heaps of E - 1 nodes. O(T k D E).

    The authors count a mass below 1e-5 as none; here only 0 is none. Their initial values: uniform within γ/100 for
    the nodes, 0.05 for the leaves.
    """

    def __init__(
        self,
        d_model: int,
        experts: int,
        *,
        top_k: Annotated[int, "trees, the most experts of a token once trained"] = 2,
        gamma: Annotated[float, "width of the smooth step"] = 1.0,
        entropy: Annotated[float, "factor of the entropy term"] = 0.01,
    ) -> None:
        super().__init__(d_model, experts)
        if top_k < 1 or gamma <= 0:
            raise PumiceError(f"top_k={top_k} must be at least 1 and gamma={gamma} above 0.")
        self.top_k, self.gamma, self.entropy = top_k, gamma, entropy
        edge = gamma / 100
        self.node_KND = nn.Parameter(torch.empty(top_k, experts - 1, d_model).uniform_(-edge, edge))
        self.leaf_KED = nn.Parameter(torch.empty(top_k, experts, d_model).uniform_(-0.05, 0.05))
        self.leaf_bias_KE = nn.Parameter(torch.zeros(top_k, experts))

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        mass_TKE = self.leaves(x_TD)
        leaf_TKE = torch.einsum("td,ked->tke", x_TD, self.leaf_KED) + self.leaf_bias_KE
        # Only leaves with mass take part in the maximum, or their exponentials could all underflow.
        top_T = leaf_TKE.detach().masked_fill(mass_TKE == 0, -torch.inf).amax((1, 2), keepdim=True)
        open_TKE = mass_TKE * torch.exp((leaf_TKE - top_T).clamp_max(0))
        weight_TE = open_TKE.sum(1) / open_TKE.sum((1, 2))[:, None]
        losses = {}
        if context.training and x_TD.shape[0]:
            losses["comet"] = self.entropy * mean_entropy(mass_TKE)
        return Routing(weight_TE, weight_TE, losses=losses)

    def leaves(self, x_TD: Tensor) -> Tensor:
        """Mass of every leaf, [T, K, E]; sums to 1 over each tree."""
        shape = (x_TD.shape[0], self.top_k, -1)
        left_TKN = smooth_step(F.linear(x_TD, self.node_KND.flatten(0, 1)), self.gamma).view(
            *shape[:2], self.experts - 1
        )
        level_TKN = x_TD.new_ones(shape[0], shape[1], 1)
        first, found = 0, []
        while first < 2 * self.experts - 1:
            # Nodes `first`.. of the heap: those before E - 1 split, the others are leaves.
            inner = max(0, min(level_TKN.shape[2], self.experts - 1 - first))
            found.append(level_TKN[:, :, inner:])
            left = left_TKN[:, :, first : first + inner]
            first += level_TKN.shape[2]
            above = level_TKN[:, :, :inner]
            level_TKN = torch.stack([above * left, above * (1 - left)], 3).flatten(2)
        return torch.cat(found, 2)
