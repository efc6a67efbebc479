"""The MoE layer, plans and contexts: equality with a plain computation, limits, messages."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

import pumice.moe
from pumice.core import registry, select
from pumice.core.errors import PumiceError
from pumice.core.registry import Bound, MethodInfo
from pumice.moe import DensePlan, MergePlan, MoE, Plan, RouteContext, Routing
from pumice.moe.layer import _check_parts
from pumice.moe.recipes import load_recipe, read_recipe

D, F, E = 16, 8, 4


def tokens(*shape, seed=0):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


def by_hand(layer, x_TD, combine_TE):
    """Every expert on every token, weighted by a dense matrix: no plan, no kernels."""
    outputs = []
    for expert in range(layer.experts.experts):
        gate, up = (x_TD @ layer.experts.gate_up_proj[expert].t()).chunk(2, 1)
        outputs.append((torch.nn.functional.silu(gate) * up) @ layer.experts.down_proj[expert].t())
    return torch.einsum("te,etd->td", combine_TE, torch.stack(outputs))


class TestLayer:
    @pytest.mark.parametrize("top_k", [1, 2, E])
    @pytest.mark.parametrize("renormalise", [False, True])
    def test_token_choice_is_the_textbook_formula(self, top_k, renormalise):
        layer = MoE(D, F, E, {"name": "linear", "renormalise": renormalise}, top_k=top_k, shared=0)
        x = tokens(9).requires_grad_()
        p = (x @ layer.router.weight_ED.t()).softmax(1)
        value, index = p.topk(top_k)
        value = value / value.sum(1, keepdim=True) if renormalise else value
        wanted = by_hand(layer, x, torch.zeros(9, E).scatter(1, index, value))
        made = layer(x)
        torch.testing.assert_close(made, wanted)
        parameters = [x, *layer.experts.parameters()] + ([] if renormalise and top_k == 1 else [layer.router.weight_ED])
        ours = torch.autograd.grad(made.square().sum(), parameters)
        theirs = torch.autograd.grad(wanted.square().sum(), parameters)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

    def test_shared_experts_are_added_with_weight_one(self):
        layer = MoE(D, F, E, shared=2)
        x = tokens(5)
        with_shared = layer(x)
        shared, layer.shared = layer.shared, None
        gate, up = (x @ shared.gate_up_proj[0].t()).chunk(2, 1)
        assert gate.shape[1] == 2 * F
        wanted = layer(x) + (torch.nn.functional.silu(gate) * up) @ shared.down_proj[0].t()
        torch.testing.assert_close(with_shared, wanted)

    def test_dense_and_merge_plans_run_the_formulas(self):
        layer = MoE(D, F, E, {"name": "slots", "slots": 3}, "soft", shared=0)
        x = tokens(2, 5)
        y = layer(x)
        plan = layer.plan
        assert isinstance(plan, DensePlan)
        slots = torch.einsum("gls,gld->gsd", plan.dispatch_GLS, x)
        hot = torch.eye(E).repeat_interleave(3, 0)
        out = torch.stack([by_hand(layer, one, hot) for one in slots])
        torch.testing.assert_close(y, torch.einsum("gls,gsd->gld", plan.combine_GLS, out))
        layer = MoE(D, F, E, assign="merge", shared=0, by="segment")
        y = layer(x)
        plan = layer.plan
        assert isinstance(plan, MergePlan)
        for group in range(2):
            alone = MoE(D, F, 1, top_k=1, shared=0)
            alone.experts.gate_up_proj.data = (plan.weight_GE[group] @ layer.experts.gate_up_proj.flatten(1)).view(
                1, -1, D
            )
            alone.experts.down_proj.data = (plan.weight_GE[group] @ layer.experts.down_proj.flatten(1)).view(1, D, F)
            torch.testing.assert_close(y[group], by_hand(alone, x[group], torch.ones(5, 1)))

    def test_by_segment_all_tokens_of_a_sequence_share_their_experts(self):
        layer = MoE(D, F, E, by="segment")
        layer(tokens(3, 5))
        combine = layer.plan.combine_TE.view(3, 5, E)
        assert torch.equal(combine, combine[:, :1].expand_as(combine))
        assert not torch.equal(combine[0, 0], combine[1, 0])
        segments = torch.tensor([0, 1, 1, 2, 2, 2])
        layer(tokens(6), RouteContext(segment_T=segments))
        assert torch.equal(layer.plan.combine_TE[1], layer.plan.combine_TE[2])
        with pytest.raises(PumiceError, match=r"context\.segment_T=None"):
            layer(tokens(6))

    def test_a_capacity_drops_counts_and_warns_once(self):
        layer = MoE(D, F, E, top_k=1, shared=0, capacity=0.5)
        x = tokens(16)
        with pytest.warns(UserWarning, match="dropped"):
            y = layer(x)
        assert layer.plan.load_E.max() <= 2
        assert layer.plan.dropped == 16 - int(layer.plan.load_E.sum()) > 0
        assert layer.plan.statistics()["drop_rate"] == layer.plan.dropped / 16
        assert int(layer.plan.asked_E.sum()) == 16
        kept = torch.bincount(layer.plan.token_A, minlength=16) > 0
        assert y[kept].abs().sum(1).all()
        assert not y[~kept].any()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(x)

    def test_losses_are_weighted_and_summed_over_a_model(self):
        model = nn.Sequential(MoE(D, F, E, balance={"load": 0.5, "z": 2.0}), MoE(D, F, E, balance=["entropy"]))
        model(tokens(7))
        first, second = model
        assert set(first.plan.losses) == {"load", "z"}
        torch.testing.assert_close(first.plan.losses["z"], 2.0 * first.plan.z_loss)
        torch.testing.assert_close(second.plan.losses["entropy"], 0.01 * second.plan.entropy)
        torch.testing.assert_close(pumice.moe.aux_loss(model), first.aux_loss + second.aux_loss)
        assert set(pumice.moe.statistics(model)) == {"0", "1"}
        assert pumice.moe.aux_loss(nn.Linear(2, 2)) == 0
        own = MoE(D, F, E, balance=[lambda plan, context: plan.importance_E.sum()])
        own(tokens(3))
        torch.testing.assert_close(own.aux_loss, own.plan.importance_E.sum())

    def test_experts_without_tokens_are_named(self):
        model = nn.ModuleDict({"block": MoE(D, F, E, top_k=1)})
        layer = model["block"]
        with torch.no_grad():
            layer.router.weight_ED.zero_()
            layer.router.weight_ED[2, 0] = 1
        layer(tokens(20).abs())
        assert pumice.moe.unused(model) == ["block expert 0", "block expert 1", "block expert 3"]
        layer.reset_seen()
        assert len(pumice.moe.unused(model)) == E

    def test_plans_keep_no_graph_in_inference_and_layers_can_be_copied(self):
        layer = MoE(D, F, E)
        layer(tokens(4))
        assert layer.plan.weight_A.requires_grad
        assert copy.deepcopy(layer).plan is None
        with torch.no_grad():
            layer(tokens(4))
        assert not layer.plan.weight_A.requires_grad

    def test_autocast_runs_experts_in_half_and_the_router_in_full_precision(self):
        layer = MoE(D, F, E)
        seen = []
        layer.router.register_forward_hook(lambda module, args, out: seen.append(out.logits_TE.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(tokens(4))
        assert y.dtype is torch.bfloat16
        assert seen == [torch.float32]
        y.float().sum().backward()

    def test_torch_compile_sees_one_graph(self):
        layer = MoE(D, F, E)
        x = tokens(2, 6)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))
        compiled(x).sum().backward()
        assert layer.router.weight_ED.grad is not None

    def test_parts_may_be_instances(self):
        class Fixed(nn.Module):
            def forward(self, x_TD, context):
                return Routing(x_TD[:, :E], x_TD[:, :E].softmax(1))

        def first(routing, context):
            index = torch.zeros(routing.tokens, 1, dtype=torch.int64)
            return Plan.top_k(index, torch.ones(routing.tokens, 1), E)

        layer = MoE(D, F, MoE(D, F, E).experts, Fixed(), first, shared=0)
        x = tokens(3)
        torch.testing.assert_close(layer(x), by_hand(layer, x, torch.tensor([[1.0, 0, 0, 0]]).repeat(3, 1)))
        assert layer.plan.routing is not None

    def test_a_recipe_is_a_layer_and_arguments_win(self, tmp_path):
        layer = MoE.from_recipe("switch-transformer", D, F, experts=E)
        assert layer._assign_bound.values["top_k"] == 1
        assert layer._assign_bound.values["capacity"] == 1.25
        assert layer.shared is None
        assert MoE.from_recipe("switch-transformer", D, F, capacity=2.0)._assign_bound.values["capacity"] == 2.0
        with pytest.raises(PumiceError, match="did you mean 'mixtral'"):
            load_recipe("mixtrl")
        file = tmp_path / "mine.yaml"
        file.write_text("router: linear\ntopk: 1\n")
        with pytest.raises(PumiceError, match="did you mean 'top_k'"):
            read_recipe(file)


REFUSED = [
    ({"top_k": 5}, "top_k=5 with experts=4"),
    ({"top_k": 0}, "top_k=0"),
    ({"capacity": 0.0}, r"capacity=0\.0"),
    ({"assign": "balanced", "capacity": 1.0}, "capacity=1.0 with assign='balanced'"),
    ({"assign": "soft", "router": "slots", "capacity": 1.0}, "capacity=1.0 with assign='soft'"),
    ({"assign": "soft", "router": "slots", "top_k": 2}, "top_k=2 with assign='soft'"),
    ({"router": "slots"}, "router='slots' scores slots, and assign='token_choice' takes experts or candidates"),
    ({"balance": {"smooth_load": 1.0}}, "reads what router='noisy' leaves"),
    ({"router": "liner"}, "did you mean 'linear'"),
    ({"assign": "topk"}, "unknown assign"),
    ({"kind": "swiglu2"}, "did you mean 'swiglu'"),
    ({"kind": {"name": "mlp", "activation": "tanhh"}}, "unknown activation"),
    ({"router": {"name": "linear", "gate": "tanh"}}, "gate='tanh'"),
    ({"balance": {"laod": 1.0}}, "did you mean 'load'"),
    ({"by": "image"}, "by='image'"),
    ({"shared": -1}, "shared=-1"),
    ({"experts": 0}, "experts=0"),
    ({"router": nn.Identity(), "assign": lambda routing, context: None, "top_k": 2}, "set it on the instance"),
]


@pytest.mark.parametrize(("given", "reason"), REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(given, reason):
    with pytest.raises(PumiceError, match=reason):
        MoE(D, F, **{"experts": E, **given})


@pytest.mark.parametrize(
    ("router", "assign", "kind", "reason"),
    [
        ({}, {"makes": "merge"}, {"merges": False}, "assign='a' averages experts, and those of kind='k' differ"),
        ({"columns": "candidates"}, {}, {}, "router='r' scores candidates, and assign='a' takes experts: use assign="),
        ({"forbids": True}, {"forbids": False}, {}, "router='r' forbids experts, and assign='a' has to use them all"),
        ({"kind": "other"}, {}, {}, "router='r' looks into experts of kind='other', not 'k'"),
        ({}, {}, {"router": "other"}, "kind='k' runs on what router='other' leaves, not 'r'"),
        ({"kind": "k"}, {}, {"router": "r"}, None),
    ],
)
def test_facts_decide_what_goes_together(router, assign, kind, reason):
    info = MethodInfo("router", "r", None, extras={**registry.router.extras, **router})
    other = MethodInfo("experts", "k", None, extras={**registry.experts.extras, **kind})
    facts = {**registry.assign.extras, **assign}
    if reason is None:
        _check_parts(Bound(info), "a", facts.__getitem__, other)
        return
    with pytest.raises(PumiceError, match=reason):
        _check_parts(Bound(info), "a", facts.__getitem__, other)


def test_bad_input_at_run_time():
    layer = MoE(D, F, E)
    layer.name = "blocks.3"
    with pytest.raises(PumiceError, match=f"last axis must be d_model={D}"):
        layer(torch.randn(3, D + 1))
    x = tokens(6)
    x[4] = torch.nan
    with pytest.raises(PumiceError, match=r"'blocks\.3' are NaN for 1 tokens, first token 4, expert 0"):
        layer(x)
    with torch.no_grad():
        layer.router.weight_ED[3] = torch.nan
    with pytest.raises(PumiceError, match="for 6 tokens, first token 0, expert 3"):
        layer(tokens(6))
    with pytest.raises(PumiceError, match=r"context\.token_ids_T=None, and router 'hash' needs it"):
        MoE(D, F, E, "hash")(tokens(3))
    with pytest.raises(PumiceError, match=r"context\.token_ids_T has 2 entries for 3 tokens"):
        MoE(D, F, E, "hash")(tokens(3), RouteContext(token_ids_T=torch.zeros(2)))


def test_a_context_reaches_every_layer_and_hands_on_the_routing():
    seen = []

    class Spy(nn.Module):
        def forward(self, x_TD, context):
            seen.append(context)
            return Routing(x_TD[:, :E], x_TD[:, :E].softmax(1))

    model = nn.Sequential(MoE(D, F, E, Spy()), MoE(D, F, E, Spy()))
    ids = torch.arange(6).view(2, 3)
    with RouteContext(token_ids_T=ids, progress=0.25).active() as given:
        model(tokens(2, 3))
    assert RouteContext.current() is None
    assert [one.progress for one in seen] == [0.25, 0.25]
    assert torch.equal(seen[0].token_ids_T, ids.flatten())
    assert (seen[0].batch, seen[0].seqlen, seen[0].segments, seen[0].training) == (2, 3, 2, True)
    assert seen[0].segment_T.tolist() == [0, 0, 0, 1, 1, 1]
    assert seen[0].experts is model[0].experts
    assert seen[0].previous is None
    assert seen[1].previous is model[0].plan.routing
    assert given.previous is model[1].plan.routing


class TestPlan:
    def test_top_k_pairs_and_mask_agree(self):
        draw = torch.Generator().manual_seed(0)
        weight = torch.rand(7, E, generator=draw)
        index = weight.topk(2).indices
        plan = Plan.top_k(index, weight.gather(1, index), E)
        mask = torch.zeros(7, E, dtype=torch.bool).scatter(1, index, True)
        other = Plan.mask(mask, weight)
        for name in ("token_A", "offsets_E1", "weight_A", "expert_A"):
            assert torch.equal(getattr(plan, name), getattr(other, name)), name
        assert torch.equal(plan.combine_TE, weight * mask)
        torch.testing.assert_close(plan.importance_E, (weight * mask).sum(0))
        assert torch.equal(plan.load_E, mask.sum(0))

    def test_the_inverse_lists_each_tokens_assignments(self):
        plan = Plan.pairs(torch.tensor([3, 0, 3, 1]), torch.tensor([1, 0, 0, 1]), torch.ones(4), 5, 2)
        starts = plan.starts_T1.tolist()
        found = [plan.expert_A[plan.by_token_A[a:b]].tolist() for a, b in itertools.pairwise(starts)]
        assert found == [[0], [1], [], [0, 1], []]

    @pytest.mark.parametrize("count", [0, 1])
    def test_none_and_one(self, count):
        for plan in (
            Plan.top_k(torch.zeros(count, 2, dtype=torch.int64), torch.ones(count, 2), E),
            Plan.mask(torch.zeros(count, E, dtype=torch.bool), torch.zeros(count, E)),
            Plan.slots(count, E, torch.zeros(())),
        ):
            assert plan.offsets_E1.shape == (E + 1,)
            assert plan.starts_T1[-1] == len(plan.token_A)
            assert all(value == value for value in plan.statistics().values())

    def test_keeping_some_counts_the_others(self):
        plan = Plan.top_k(torch.tensor([[0, 1], [0, 2], [0, 1]]), torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.7, 0.3]]), 3)
        kept = plan.limit(1, plan.weight_A)
        assert kept.load_E.tolist() == [1, 1, 1]
        assert kept.asked_E.tolist() == [3, 2, 1]
        assert kept.dropped == 3
        assert kept.token_A.tolist() == [2, 0, 1]
        assert kept.keep(torch.tensor([True, False, True])).dropped == 4

    def test_renormalised_weights_sum_to_one(self):
        plan = Plan.top_k(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.1, 0.3], [2.0, 2.0]]), 3)
        torch.testing.assert_close(plan.renormalised().combine_TE.sum(1), torch.ones(2))

    def test_statistics_of_known_plans(self):
        logits = torch.zeros(4, 2)
        even = Plan.top_k(torch.tensor([[0], [1], [0], [1]]), torch.ones(4, 1), 2, Routing(logits, logits.softmax(1)))
        numbers = even.statistics()
        assert numbers["load_cv"] == 0
        assert numbers["load_max"] == numbers["load_min"] == 1
        assert numbers["entropy"] == pytest.approx(0.6931472)
        assert numbers["z_loss"] == pytest.approx(0.6931472**2)
        one = Plan.top_k(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), 2).statistics()
        assert (one["load_max"], one["load_min"], one["unused"], one["load_cv"]) == (2, 0, 1, 1)


class TestRouting:
    def test_candidates_and_slots_sum_to_experts(self):
        weight = torch.rand(3, 2)
        routing = Routing(weight, weight, candidate_TC=torch.tensor([[0, 4], [4, 4], [1, 2]]), experts=5)
        wanted = torch.zeros(5)
        for row, (a, b) in zip(weight, [(0, 4), (4, 4), (1, 2)], strict=True):
            wanted[a] += row[0]
            wanted[b] += row[1]
        torch.testing.assert_close(routing.per_expert(weight), wanted)
        slots = Routing(torch.zeros(2, 6), torch.ones(2, 6), slots=3)
        assert slots.experts == 2
        assert slots.per_expert(slots.weight_TE).tolist() == [6, 6]
        with pytest.raises(PumiceError, match="number of experts"):
            Routing(weight, weight, candidate_TC=torch.zeros(3, 2, dtype=torch.int64))

    def test_what_is_not_allowed_is_never_chosen(self):
        allowed = torch.tensor([[True, False, True, False], [False, False, False, True], [False] * 4])
        weight = torch.tensor([[0.1, 0.9, 0.2, 0.8]]).repeat(3, 1)
        routing = Routing(weight, weight, allowed_TE=allowed, renormalise=True)
        for assign, given in (("token_choice", {"top_k": 2}), ("expert_choice", {}), ("threshold", {"least": 1})):
            plan = registry.assign.bind({"name": assign, **given})(routing, RouteContext())
            assert not plan.combine_TE[~allowed].any(), assign
            assert set(plan.token_A.tolist()) == {0, 1}, assign
        assert torch.equal(routing.probability_TE[1], torch.tensor([0.0, 0, 0, 1]))


def test_the_best_of_each_group():
    priority = torch.tensor([1.0, 3.0, 2.0, 3.0, 5.0])
    group = torch.tensor([0, 0, 1, 0, 1])
    assert select.best_of_groups(priority, group, 1).tolist() == [False, True, False, False, True]
    assert select.best_of_groups(priority, group, 2).tolist() == [False, True, True, True, True]
    assert select.best_of_groups(priority, group, torch.tensor([0, 2])).tolist() == [False, False, True, False, True]
    assert select.best_of_groups(priority[:0], group[:0], 2).tolist() == []
