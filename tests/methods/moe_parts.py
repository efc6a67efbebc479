"""Small parts of MoE layers for the tests of methods."""

import torch

from pumice.core import registry
from pumice.moe import MoE, RouteContext

D, E = 16, 8


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(count=40, seed=1):
    return draw(count, D, seed=seed)


def router(name, d_model=D, experts=E, **options):
    torch.manual_seed(0)
    return registry.router.bind({"name": name, **options})(d_model, experts)


def assigned(name, routing, context=None, **options):
    return registry.assign.bind({"name": name, **options})(routing, context or RouteContext())


def balance(name, plan, context=None, **options):
    made = registry.balance.bind({"name": name, **options})
    return made(plan, context or RouteContext())


def layer(router="linear", d_model=D, d_ff=8, experts=E, **given):
    torch.manual_seed(0)
    return MoE(d_model, d_ff, experts, router, **{"shared": 0, "balance": {}, **given})


def training(seed=0, **given):
    return RouteContext(training=True, generator=torch.Generator().manual_seed(seed), **given)
