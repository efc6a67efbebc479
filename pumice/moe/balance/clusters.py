"""Siblings alike, clusters apart: the variance terms of MoEC.

Legend: T tokens, E experts, C clusters, N experts of a cluster.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from pumice.core.registry import balance
from pumice.moe.balance.columns import probabilities
from pumice.moe.plan import AnyPlan
from pumice.moe.route.clusters import check_clusters
from pumice.moe.routing import RouteContext


@balance("clusters", key="moec", paper="arXiv:2207.09094", weight=1.0)
def clusters(
    plan: AnyPlan,
    context: RouteContext,
    *,
    clusters: Annotated[int, "of equally many experts, as the router's"] = 4,
    apart: Annotated[float, "weight of the second term"] = 1.0,
) -> Tensor:
    """Mean over tokens of (variance within clusters) - apart · (variance between the clusters' means), of probabilities.

    Times E², since probabilities are of the order 1 / E. Minimised, experts of a cluster get the same probability and a
    token prefers one cluster; the sum of both terms would be the variance over all experts. Which way each term pulls
    is from memory, and how the paper joins the two is not known here. O(T E).
    """
    probability_TE = probabilities(plan, "clusters")
    count = check_clusters(clusters, probability_TE.shape[1], "balance 'clusters'")
    if probability_TE.shape[0] == 0:
        return probability_TE.sum()
    cluster_TCN = probability_TE.unflatten(1, (count, -1))
    within_T = cluster_TCN.var(2, unbiased=False).mean(1)
    between_T = cluster_TCN.mean(2).var(1, unbiased=False)
    return probability_TE.shape[1] ** 2 * (within_T - apart * between_T).mean()
