"""A pruning method is a choice on six axes: score, recovery, allocation, goal, values, pattern; here they are put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.core.registry import Bound
from pumice.core.stats import MADE_STATS, split_needs
from pumice.core.view import DEFAULT_IGNORE, WeightView
from pumice.weights.grid import Coding
from pumice.weights.patterns.base import Pattern, parse

Spec = str | Mapping[str, Any]


def pattern_family(pattern: Pattern) -> str:
    """Registered name of a pattern's family."""
    return next(info.name for info in registry.pattern.members() if isinstance(pattern, info.obj))


@dataclass(frozen=True)
class Axes:
    """What to prune and how, checked: nothing in it can fail later for a reason that is known now."""

    score: Bound
    recover: Bound
    allocation: Bound
    goal: Bound
    values: Bound
    pattern: Pattern
    density: float
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = DEFAULT_IGNORE
    sequential: bool = False
    """Inside a block too, a layer is calibrated on what the pruned layers before it give."""
    name: str = ""
    key: str | None = field(default=None, compare=False)

    @classmethod
    def make(
        cls,
        score: Spec,
        *,
        density: float | None = None,
        pattern: str | Pattern | None = None,
        recover: Spec = "none",
        allocation: Spec | None = None,
        goal: Spec = "layer",
        values: Spec = "none",
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = DEFAULT_IGNORE,
        sequential: bool = False,
        name: str = "",
        key: str | None = None,
    ) -> Axes:
        """Look the names up and refuse what cannot be combined.

        Raises:
            PumiceError: unknown name or option, density outside (0, 1], or a combination without sense.
        """
        scorer = registry.scorer.bind(score)
        legal = parse(pattern or "unstructured", scorer.info.extras["scope"])
        everywhere = getattr(legal, "scope", None) == "global"
        share = registry.allocation.bind(allocation or ("global" if everywhere else "uniform"))
        if everywhere and share.name != "global":
            raise PumiceError(
                f"pattern={legal.text!r} already spreads the density over all layers; allocation={share.name!r} "
                "contradicts it: leave one of them out."
            )
        # N:M fixes the density of its own, and refuses every allocation below.
        own = None if pattern_family(legal) == "nm" else share.info.extras["density"]
        axes = cls(
            scorer,
            registry.recovery.bind(recover),
            share,
            registry.goal.bind(goal),
            registry.values.bind(values),
            legal,
            legal.density(density if own is None else own(density, share.values)),
            (targets,) if isinstance(targets, str) else None if targets is None else tuple(targets),
            (ignore,) if isinstance(ignore, str) else tuple(ignore),
            sequential,
            name or scorer.name,
            key,
        )
        axes._refuse()
        return axes

    def _refuse(self) -> None:
        family = pattern_family(self.pattern)
        if family == "nm" and self.allocation.name != "uniform":
            raise PumiceError(
                f"allocation={self.allocation.name!r} with pattern={self.pattern.text!r}: an N:M pattern fixes the "
                "density of every layer; leave the allocation out, or use pattern='unstructured'."
            )
        accepted = self.recover.info.extras["patterns"]
        if accepted is not None and family not in accepted:
            raise PumiceError(
                f"recover={self.recover.name!r} works on patterns {', '.join(accepted)}, not on {self.pattern.text!r}: "
                "it moves single weights. Use recover='obs' or 'none'."
            )
        if self.allocation.name == "lamp" and self.score.name != "magnitude":
            raise PumiceError(
                f"allocation='lamp' shares the density by magnitude, score={self.score.name!r} orders otherwise: use "
                "score='magnitude', or allocation='global', which compares your score over all layers."
            )
        if self.selects_itself and self.score.options:
            raise PumiceError(
                f"score={self.score.describe()!r} beside recover={self.recover.name!r}: the recovery chooses the mask with "
                "options of its own; give them to recover."
            )
        split_needs(self.needs | self.allocation.needs)

    @property
    def selects_itself(self) -> bool:
        """Whether the recovery chooses the mask as it goes, which it does with its own score only."""
        return self.recover.info.extras["selects"] == self.score.name

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of score, recovery and goal (the allocation's own come from the dense model)."""
        return frozenset().union(*(part.info.needs for part in (self.score, self.recover, self.goal)))

    @property
    def needs_data(self) -> bool:
        return bool((self.needs | self.allocation.needs) - MADE_STATS.keys())

    @property
    def whole_model(self) -> str | None:
        """Why the model has to be in memory as a whole, or None where one block at a time will do."""
        if split_needs(self.needs | self.allocation.needs)[1]:
            return "the method needs gradients of the whole model"
        if "loss" in self.allocation.needs:
            return f"allocation {self.allocation.name} runs the whole model"
        return None

    def check_views(self, views: Sequence[WeightView]) -> None:
        """PumiceError naming the first layer that the pattern does not fit."""
        for view in views:
            o, i = view.shape_OI
            self.fitted(view).check_shape(view.module_name, o, i, self.density)
            if self.coding is not None:
                self.coding.check(view.module_name, i)

    @property
    def coding(self) -> Coding | None:
        """How the kept weights are rounded; None leaves them in floating point."""
        return self.values()

    def fitted(self, view: WeightView) -> Pattern:
        """The pattern as it lies on one layer: a channel of a convolution is as wide as its kernel."""
        shape = view.tensor.shape
        is_convolution = len(shape) > 2 and view.expert is None
        return self.pattern.fit(shape[2:].numel() if is_convolution else 1)

    def describe(self) -> dict[str, Any]:
        """Everything that decides the result, defaults written out: for reports and for checking a resume."""
        return {
            "name": self.name,
            "score": self.score.describe(),
            "recover": self.recover.describe(),
            "allocation": self.allocation.describe(),
            "goal": self.goal.describe(),
            "values": self.values.describe(),
            "pattern": self.pattern.text,
            "density": self.density,
            "targets": list(self.targets) if self.targets is not None else None,
            "ignore": list(self.ignore),
            "sequential": self.sequential,
        }
