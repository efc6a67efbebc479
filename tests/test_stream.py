"""The block-by-block walk: every unit sees what a full pass of the model, pruned up to there, gives it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pumice.core.errors import PumiceError
from pumice.core.stream import Stream, find_units
from pumice.core.view import find_views
from tests import tiny

NEEDS = frozenset({"hessian", "input_mean"})


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(batch=2, length=9, seed=0, **more):
    tokens = torch.randint(4, 100, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, **more}


def rows_of(module, x, mask):
    if isinstance(module, nn.Conv2d):
        columns = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        return columns.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    if mask is not None and x.shape[:2] == mask.shape:
        return x[mask.bool()][None]
    return x.reshape(1, -1, x.shape[-1])


def by_hooks(model, batches, views):
    """Statistics of the views from ordinary full passes."""
    rows = {view.name: [] for view in views}
    mask = None

    def hook(view):
        def before(module, args):
            rows[view.name].append(rows_of(module, args[0].detach(), mask).clone())

        return view.module.register_forward_pre_hook(before)

    handles = [hook(view) for view in views]
    with torch.no_grad():
        for batch in batches:
            if isinstance(batch, dict):
                mask = batch.get("attention_mask")
                model(**batch)
            else:
                model(*batch) if isinstance(batch, tuple) else model(batch)
    for handle in handles:
        handle.remove()
    out = {}
    for name, parts in rows.items():
        if parts:
            x = torch.cat(parts, dim=1)
            out[name] = {"hessian": x.mT @ x / x.shape[1], "input_mean": x.mean(1)}
    return out


def damage(unit):
    """Any change that the next units must notice."""
    for view in unit.views:
        w = view.read()
        view.write(w * (torch.arange(w.numel()).view(w.shape) % 3 > 0))


def check(model, batches, *, chained=None, repeated=(), unreached=(), **given):
    """Walk with changes and compare every unit's statistics with full passes of the model as it then is."""
    views = find_views(model, **given)
    stream = Stream(model, views, batches)
    seen = []

    def visit(unit, collect):
        truth = by_hooks(model, batches, unit.views)
        found = collect(NEEDS)
        assert set(found) == set(truth)
        for name, stats in truth.items():
            for key, value in stats.items():
                assert torch.allclose(found[name][key], value, rtol=1e-3, atol=1e-4), (unit.name, name, key)
        damage(unit)
        seen.append(unit.name)

    stream.walk(visit)
    assert sorted(seen) == sorted(unit.name for unit in stream.units)
    assert sorted(unit.name for unit in stream.unreached) == sorted(unreached)
    if chained is not None:
        assert [unit.name for unit in stream.units if unit.chained] == chained
    assert stream._repeated == set(repeated)
    return stream


def test_llama_is_one_chain():
    model = tiny.llama(num_hidden_layers=3)
    check(model, [ids(seed=0), ids(3, 7, seed=1)], chained=["model.layers.1", "model.layers.2"])


def test_llama_with_padding():
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    check(tiny.llama(), [ids(attention_mask=mask)], chained=["model.layers.1"])


def test_the_order_is_that_of_execution():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, 2)
            self.first = nn.Linear(3, 4)

        def forward(self, x):
            return self.last(self.first(x).relu())

    stream = check(Backwards(), [draw(6, 3)])
    assert [unit.name for unit in stream.units] == ["first", "last"]


def test_bert_with_its_pooler():
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 4:] = 0
    check(tiny.bert(num_hidden_layers=2), [ids(attention_mask=mask)], chained=["encoder.layer.1"])


def test_encoder_and_decoder():
    model = tiny.t5()
    batches = [ids(2, 9, seed=s, decoder_input_ids=ids(2, 6, seed=s + 5)["input_ids"]) for s in range(2)]
    stream = check(model, batches)
    assert [unit.name for unit in stream.units] == ["encoder.block.0", "decoder.block.0"]


def test_experts_and_tied_layers_of_a_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    small = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = MixtralForCausalLM(MixtralConfig(**small, num_attention_heads=2, num_key_value_heads=2)).eval()
    check(model, [ids(4, 20)], targets=["self_attn.*"], chained=["model.layers.1"])


class Residual(nn.Module):
    """A branch, a strided shortcut, changes in place, and a depthwise convolution."""

    def __init__(self, inner, outer, stride):
        super().__init__()
        self.expand = nn.Conv2d(inner, outer, 3, stride=stride, padding=1)
        self.depth = nn.Conv2d(outer, outer, 3, padding=1, groups=outer)
        self.short = nn.Conv2d(inner, outer, 1, stride=stride)

    def forward(self, x):
        out = F.relu_(self.expand(x))
        out = self.depth(out)
        out += self.short(x)
        return out.relu_()


class Branched(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList([Residual(4, 6, 2), Residual(6, 6, 1), Residual(6, 8, 1)])
        self.head = nn.Linear(14, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        a = self.blocks[0](x)
        b = self.blocks[1](a)
        c = self.blocks[2](b)
        return self.head(torch.cat([c.mean((2, 3)), a.mean((2, 3))], dim=1))


def test_cnn_with_branches():
    torch.manual_seed(0)
    check(Branched().eval(), [draw(4, 3, 12, 12)], ignore=(), chained=["blocks.1", "blocks.2"])


def test_changes_in_place_between_blocks_break_the_chain():
    layers = [nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 6)]
    check(nn.Sequential(*layers), [draw(8, 6), draw(3, 6, seed=1)], chained=["4"])


class AddsInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        x += self.fc(x)
        return x


def test_blocks_that_change_their_input_in_place():
    model = nn.Sequential(nn.Linear(6, 6), AddsInPlace(), AddsInPlace(), nn.Linear(6, 6))
    check(model, [draw(8, 6), draw(8, 6, seed=1)])


class Twice(nn.Module):
    """The same block run several times, with another between."""

    def __init__(self, block):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6), block, nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x):
        before, shared, middle, last = self.blocks
        x = shared(before(x).relu())
        return last(middle(shared(shared(x))))


@pytest.mark.parametrize("block", [nn.Linear(6, 6), AddsInPlace(), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))])
def test_a_block_run_several_times_counts_every_time(block):
    check(Twice(copy.deepcopy(block)), [draw(8, 6), draw(5, 6, seed=1)], repeated=["blocks.1"])


def test_layers_used_twice_inside_a_block():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.a(self.b(self.a(x)).relu())

    check(nn.Sequential(Inner(), Inner()), [draw(8, 6, seed=s) for s in range(3)], chained=["1"])


class Pairs(nn.Module):
    """Lists of lists, as many hand-written transformers have them; a list is not a block that can be called."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]) for _ in range(2)])

    def forward(self, x):
        for first, second in self.layers:
            x = first(x).relu() + x
            x = second(x).relu() + x
        return x


def test_lists_of_lists():
    stream = check(Pairs(), [draw(8, 6)])
    assert [unit.name for unit in stream.units] == ["layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1"]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, step, x=None, *, scale=None):
        x = x[0] if isinstance(x, list) else x
        return (self.fc(x).relu() * (1 if scale is None else scale),)


class Unusual(nn.Module):
    """Hidden states behind a number, in a keyword, in a list; arguments that depend on the hidden state."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Scaled() for _ in range(5))

    def forward(self, x):
        (x,) = self.blocks[0](0, x)
        (x,) = self.blocks[1](1, x=x)
        (x,) = self.blocks[2](2, [x])
        (x,) = self.blocks[3](3, x, scale=x.mean())
        return self.blocks[4](4, x, scale=torch.tensor(2.0))[0]


def test_unusual_calls():
    check(Unusual(), [draw(8, 6), draw(8, 6, seed=1)], chained=["blocks.1", "blocks.4"])


class Gathers(nn.Module):
    """Sizes and side results that a pass with blocks left out gets wrong."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 5)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(4)])
        self.head = nn.Linear(17, 3)

    def forward(self, x):
        a = self.blocks[0](x)
        side = self.norms[0](a)
        b = self.blocks[1](a)
        other = self.norms[1](b)
        return self.head(torch.cat([side, other, self.blocks[2](b)], dim=1))


class Sized(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Scaled(), Scaled(), Scaled()])

    def forward(self, x):
        for block in self.blocks:
            (x,) = block(0, x, scale=float(x.mean()))
        return x


def test_side_results_and_sizes_between_blocks():
    check(Gathers().eval(), [draw(8, 6)])
    check(Sized(), [draw(8, 6), draw(8, 6, seed=1)], chained=[])


def test_a_stack_of_which_nothing_is_called():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(6, 6)])

        def forward(self, x):
            return x @ self.blocks[0].weight.t()

    check(Idle(), [draw(8, 6)], unreached=["blocks.0"])


def test_batches_of_any_form():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 2)

        def forward(self, a, b):
            return self.fc(a + b)

    check(Sum(), [(draw(4, 6), draw(4, 6, seed=1)), {"a": draw(4, 6, seed=2), "b": draw(4, 6, seed=3)}])
    check(tiny.llama(), [ids()["input_ids"], (ids(seed=1)["input_ids"],)], chained=["model.layers.1"])


def test_single_layer_model():
    check(nn.Linear(6, 3), [draw(4, 6)])


def test_layers_never_reached_are_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.used(x)

    check(Unused(), [draw(4, 6)], unreached=["spare"])


def test_chain_and_full_replay_give_the_same():
    """Statistics and results of a chain against a stream that is made to replay the whole model for each unit."""
    batches = [ids(seed=0), ids(3, 7, seed=1)]
    results = []
    for chain in (True, False):
        model = tiny.llama(num_hidden_layers=3)
        stream = Stream(model, find_views(model), batches)
        assert len(stream.segments()) == 1
        if not chain:
            for unit in stream.units:
                unit.chained = False
        found = {}

        def visit(unit, collect, found=found):
            found.update(collect(NEEDS))
            damage(unit)

        stream.walk(visit)
        results.append((found, model.state_dict()))
    (one, weights), (other, other_weights) = results
    assert one.keys() == other.keys()
    for name in one:
        assert all(torch.equal(one[name][key], other[name][key]) for key in NEEDS)
    assert all(torch.equal(weights[key], other_weights[key]) for key in weights)


class Disk:
    """Weights live here; only what is loaded has memory."""

    def __init__(self, model, names):
        self.weights = {name: copy.deepcopy(model.get_submodule(name).state_dict()) for name in names}
        self.loaded, self.most = set(), 0
        for name in names:
            self._empty(model.get_submodule(name))

    def _empty(self, module):
        module.to_empty(device="meta")

    def load(self, name, module, original=False):
        assert name not in self.loaded
        module.to_empty(device="cpu")
        module.load_state_dict(self.weights[name])
        self.loaded.add(name)
        self.most = max(self.most, len(self.loaded))

    def free(self, name, module):
        self.weights[name] = copy.deepcopy(module.state_dict())
        self.loaded.discard(name)
        self._empty(module)


def walk_from_disk(build, batches, names=None, **given):
    plain, model = build(), build()
    names = names or [unit.name for unit in find_units(model, find_views(model, **given))]
    source = Disk(model, names)
    for each, where in ((plain, None), (model, source)):
        Stream(each, find_views(each, **given), batches, source=where).walk(
            lambda unit, collect: (collect(NEEDS), damage(unit))
        )
    assert source.most == 1, "one unit at a time"
    assert not source.loaded
    for name in names:
        truth = plain.get_submodule(name).state_dict()
        assert all(torch.equal(source.weights[name][key], truth[key]) for key in truth)


def test_only_one_unit_is_in_memory():
    walk_from_disk(lambda: tiny.llama(num_hidden_layers=3), [ids(), ids(seed=1)])


def test_only_one_unit_is_in_memory_where_nothing_is_chained():
    torch.manual_seed(0)
    start = Branched().eval()
    walk_from_disk(lambda: copy.deepcopy(start), [draw(4, 3, 12, 12)], ignore=())


def test_only_one_unit_is_in_memory_with_a_repeated_block():
    torch.manual_seed(0)
    start = Twice(nn.Linear(6, 6))
    walk_from_disk(lambda: copy.deepcopy(start), [draw(8, 6)])


def test_nan_activations_are_named():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.breaks = False

        def forward(self, x):
            x = self.fc(x)
            return x * torch.inf - x * torch.inf if self.breaks else x

    model = nn.Sequential(Breaks(), Breaks(), Breaks())
    stream = Stream(model, find_views(model), [draw(4, 6)])
    model[1].breaks = True
    with pytest.raises(PumiceError, match="block 1 returns NaN or Inf"):
        stream.walk(lambda unit, collect: None)
    x = draw(4, 6)
    x[0, 0] = torch.nan
    model[1].breaks = False
    stream = Stream(model, find_views(model), [x])
    with pytest.raises(PumiceError, match=r"input of layer 0\.fc\.weight holds NaN"):
        stream.walk(lambda unit, collect: collect(NEEDS))


def test_no_data_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(PumiceError, match="data is empty"):
        Stream(model, find_views(model), [])


def test_the_model_is_left_as_it_was():
    model = Branched()
    model.train()
    model.norm.eval()
    running = model.norm.running_mean.clone()
    stream = Stream(model, find_views(model), [draw(4, 3, 12, 12)])
    stream.walk(lambda unit, collect: collect(NEEDS))
    assert (model.training, model.norm.training, model.blocks[0].training) == (True, False, True)
    assert torch.equal(model.norm.running_mean, running)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__


def test_a_failing_visit_leaves_the_model_usable():
    model = tiny.llama()
    before = model(**ids()).logits
    stream = Stream(model, find_views(model), [ids()])

    def fail(unit, collect):
        collect(NEEDS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream.walk(fail)
    assert torch.equal(model(**ids()).logits, before)


def test_bf16_products_stay_near_float32():
    found = {}
    for compute in (torch.float32, torch.bfloat16):
        model = tiny.llama()
        stream = Stream(model, find_views(model), [ids()], compute=compute)
        stream.walk(
            lambda unit, collect, compute=compute: (found.setdefault(compute, {}).update(collect(NEEDS)), damage(unit))
        )
    errors = {}
    for name, stats in found[torch.float32].items():
        errors[name] = float(
            (found[torch.bfloat16][name]["hessian"] - stats["hessian"]).norm() / stats["hessian"].norm()
        )
    assert max(errors.values()) < 0.05
    assert errors["model.layers.1.mlp.down_proj.weight"] > 0
