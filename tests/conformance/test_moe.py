"""Every router x assignment x kind of experts of the registry on a tiny layer: it runs as promised, or is refused."""

import copy
import warnings

import pytest
import torch

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.moe import DensePlan, MergePlan, MoE, Plan, RouteContext, Routing
from pumice.moe.recipes import recipes
from pumice.moe.route.base import Router

D, F, E, B, S = 16, 8, 8, 2, 6
ROUTERS = [info.name for info in registry.methods("router")]
ASSIGNS = [info.name for info in registry.methods("assign")]
KINDS = [info.name for info in registry.methods("experts")]
BALANCES = [info.name for info in registry.methods("balance")]
RECIPES = [one.name for one in recipes()]


def context(shape=(B, S), seed=0):
    """Everything that a router may ask for, for tokens of this shape."""
    count = torch.Size(shape).numel()
    sequences, length = shape if len(shape) == 2 else (1, count)
    logits = torch.randn(count, E, generator=torch.Generator().manual_seed(5))
    return RouteContext(
        token_ids_T=torch.arange(count) * 7 % 50,
        modality_T=torch.arange(count) % 2,
        labels_G=torch.arange(sequences) % 2,
        attention_BHQK=torch.ones(sequences, 2, length, length).tril().softmax(-1),
        previous=Routing(logits, logits.softmax(1)),
        progress=0.5,
        generator=torch.Generator().manual_seed(seed),
    )


def tokens(*shape):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))


def layer(router="linear", assign="token_choice", kind="swiglu", **given):
    torch.manual_seed(0)
    return MoE(D, F, E, router, assign, kind=kind, **given)


def attempt(router, assign, kind):
    """The layer, or None where the registry's facts forbid it; the refusal names what is refused."""
    try:
        return layer(router, assign, kind)
    except PumiceError as error:
        reason = str(error)
    assert any(repr(name) in reason for name in (router, assign, kind)), reason
    return None


def partner(family, name):
    """A layer with this member and plain other parts, whichever of them go with it."""
    for router in [name] if family == "router" else ["linear", *ROUTERS]:
        for assign in [name] if family == "assign" else ["token_choice", *ASSIGNS]:
            for kind in [name] if family == "experts" else ["swiglu", *KINDS]:
                found = attempt(router, assign, kind)
                if found is not None:
                    return found
    raise AssertionError(f"{family} {name} goes with nothing")


def facts(made):
    return made._router_bound.info.extras, made._assign_bound.info.extras


def check_plan(plan, count):
    """What every plan has to be."""
    assert plan.tokens == count
    assert plan.experts == E
    assert plan.routing is not None
    assert plan.load_E.shape == plan.importance_E.shape == plan.probability_E.shape == (E,)
    if isinstance(plan, Plan):
        offsets = plan.offsets_E1
        assert offsets[0] == 0
        assert offsets[-1] == len(plan.token_A) == len(plan.weight_A)
        assert (offsets.diff() >= 0).all()
        assert ((plan.token_A >= 0) & (plan.token_A < count)).all()
        assert (plan.weight_A >= 0).all()
        assert torch.equal(torch.bincount(plan.expert_A, minlength=E), plan.load_E)
        same = plan.expert_A[1:] == plan.expert_A[:-1]
        assert (plan.token_A.diff()[same] >= 0).all(), "sorted by token within an expert"
    elif isinstance(plan, DensePlan):
        if count:
            torch.testing.assert_close(plan.dispatch_GLS.sum(1), torch.ones(plan.dispatch_GLS[:, 0].shape))
    else:
        assert isinstance(plan, MergePlan)
        assert (plan.weight_GE >= 0).all()
    numbers = plan.statistics()
    assert all(isinstance(value, float) and value == value for value in numbers.values())


@pytest.mark.parametrize("assign", ASSIGNS)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_assignment_and_kind(router, assign):
    for kind in KINDS:
        made = attempt(router, assign, kind)
        if made is None:
            continue
        known, _ = facts(made)
        x = tokens(B, S).requires_grad_()
        y = made(x, context())
        assert y.shape == x.shape
        assert torch.isfinite(y).all()
        check_plan(made.plan, B * S)
        (y.square().sum() + made.aux_loss).backward()
        reached = [p.grad is not None and bool(p.grad.any()) for p in made.router.parameters() if p.requires_grad]
        # A single expert whose weight is renormalised has weight 1, whatever the router says.
        constant = made.plan.routing.renormalise and made.plan.statistics()["per_token"] <= 1
        if known["gradient"] == "none":
            assert not any(reached)
        elif known["gradient"] == "loss" or not constant:
            assert any(reached), "no gradient reaches the router"
        assert any(p.grad is not None and bool(p.grad.any()) for p in made.experts.parameters())
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in made.parameters())
        assert x.grad is not None


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("router", n) for n in ROUTERS), *(("assign", n) for n in ASSIGNS), *(("experts", n) for n in KINDS)],
)
class TestEveryPart:
    def test_empty_batches_and_single_tokens(self, family, name):
        made = partner(family, name)
        for shape in ((0,), (1,), (0, S), (2, 0), (1, 1)):
            x = tokens(*shape).requires_grad_()
            y = made(x, context(shape))
            assert y.shape == x.shape
            assert torch.isfinite(y).all()
            (y.sum() + made.aux_loss).backward()
            check_plan(made.plan, x[..., 0].numel())

    def test_half_precision_keeps_the_router_in_float32(self, family, name):
        made = partner(family, name)
        made.to(torch.bfloat16)
        y = made(tokens(B, S).bfloat16(), context())
        assert y.dtype is torch.bfloat16
        assert torch.isfinite(y).all()
        if isinstance(made.router, Router):
            assert all(p.dtype is torch.float32 for p in made.router.parameters() if p.is_floating_point())
        assert all(p.dtype is torch.bfloat16 for p in made.experts.parameters())

    def test_the_same_seed_gives_the_same_result(self, family, name):
        made = partner(family, name)
        twin = copy.deepcopy(made)
        assert torch.equal(made(tokens(B, S), context(seed=3)), twin(tokens(B, S), context(seed=3)))
        made.eval(), twin.eval()
        twin.load_state_dict(made.state_dict())
        assert torch.equal(made(tokens(B, S), context(seed=3)), twin(tokens(B, S), context(seed=4))), (
            "no chance in eval"
        )

    def test_training_and_evaluation_differ_only_where_declared(self, family, name):
        made = partner(family, name)
        if any(known["chance"] or known["trains"] for known in facts(made)):
            return
        trained = made(tokens(B, S), context())
        assert torch.equal(trained, made.eval()(tokens(B, S), context()))

    def test_a_checkpoint_holds_everything(self, family, name):
        made = partner(family, name)
        made(tokens(B, S), context())
        torch.manual_seed(9)
        other = copy.deepcopy(made)
        for p in other.parameters():
            torch.nn.init.normal_(p)
        other.load_state_dict(made.state_dict())
        made.eval(), other.eval()
        assert torch.equal(made(tokens(B, S), context()), other(tokens(B, S), context()))

    def test_causal_means_that_later_tokens_do_not_matter(self, family, name):
        made = partner(family, name).eval()
        causal = all(known["causal"] for known in facts(made))
        x = tokens(1, S)
        changed = x.clone()
        changed[:, S // 2 :] *= -3
        with torch.no_grad():
            before, after = made(x, context((1, S))), made(changed, context((1, S)))
        if causal:
            torch.testing.assert_close(before[:, : S // 2], after[:, : S // 2])


@pytest.mark.parametrize("name", BALANCES)
def test_every_balance_loss(name):
    wanted = registry.balance.get(name).extras["router"]
    for assign in ASSIGNS:
        try:
            made = layer(wanted or "linear", assign, balance=[name])
        except PumiceError:
            continue
        made(tokens(B, S), context())
        assert name in made.plan.losses
        assert torch.isfinite(made.plan.losses[name])
        assert made.plan.losses[name].dim() == 0
        made(tokens(0), context((0,)))
        assert torch.isfinite(made.aux_loss)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_trains_and_explains_itself(name):
    recipe = next(one for one in recipes() if one.name == name)
    assert recipe.summary.endswith(".")
    assert recipe.paper
    torch.manual_seed(0)
    made = MoE.from_recipe(name, D, F, experts=E)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        y = made(tokens(B, S), context())
    assert torch.isfinite(y).all()
    (y.square().sum() + made.aux_loss).backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)


def test_every_router_is_a_router_and_options_are_plain():
    for info in registry.methods("router"):
        assert issubclass(info.obj, Router)
        assert info.paper, info.name
    for family in ("router", "assign", "balance", "experts"):
        for info in registry.methods(family):
            for option in info.options.values():
                assert option.help, f"option {option.name} of {info.name} has no help"
                assert option.coerce(str(option.default), "text") == option.default
