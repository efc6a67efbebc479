"""One layer with real statistics, for the tests of single methods."""

import torch

from pumice.core import registry
from pumice.prune.layer import Selector
from pumice.weights.patterns.base import parse


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(tokens=400, width=16, seed=0):
    """Inputs whose columns depend on each other, differ in size and have a mean: white ones hide mistakes."""
    mix = draw(width, width, seed=seed + 1) + 0.5
    return draw(tokens, width, seed=seed) @ mix * torch.linspace(0.2, 2, width) + 0.3


def stats_of(x_TI):
    x = x_TI.double()
    return {
        "input_sqnorm": x.square().mean(0).float(),
        "input_mean": x.mean(0).float(),
        "input_var": x.var(0, unbiased=False).float(),
        "hessian": (x.t() @ x / len(x)).float(),
    }


def score(name, w_OI, stats, **options):
    return registry.scorer.get(name).bind(options)(w_OI, stats)


def recover(name, w_OI, stats, scorer="magnitude", pattern="unstructured:row", density=0.5, **options):
    """(weight, mask, notes) of a recovery beside a scorer; `scorer=None` lets the recovery select itself."""
    legal = parse(pattern)
    selector = Selector(
        legal, legal.density(None) if ":" in pattern and pattern[0].isdigit() and "x" not in pattern else density
    )
    bound = None if scorer is None else lambda w: score(scorer, w, stats)
    new, mask = registry.recovery.get(name).bind(options)(w_OI, stats, bound, selector)
    return new, mask, selector.notes


def error(x_TI, w_OI, new_OI):
    """Squared output error of every row, [O]."""
    return (x_TI.double() @ (w_OI - new_OI).double().t()).square().sum(0)
