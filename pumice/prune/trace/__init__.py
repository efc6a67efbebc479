"""Coupled channels, heads and KV groups of any model: found by running it, removed for good."""

from pumice.prune.trace.cut import remove, remove_all
from pumice.prune.trace.groups import Group, Member
from pumice.prune.trace.tracer import Traced, explore, trace

__all__ = ["Group", "Member", "Traced", "explore", "remove", "remove_all", "trace"]
