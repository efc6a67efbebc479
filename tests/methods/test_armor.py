"""ARMOR: starts at NoWag-P, no update raises the error, the steps are optimal, and the module runs and is stored."""

from itertools import combinations, pairwise

import pytest
import torch
from torch import nn

import pumice
from pumice.core.errors import PumiceError
from pumice.prune.layer import Selector
from pumice.prune.rewrite.armor import Factors, armor
from pumice.weights.modules import SparseLinear
from pumice.weights.patterns.base import parse
from pumice.weights.wrapped import WrappedLinear
from tests import tiny
from tests.methods.layers import correlated, draw, error, stats_of

SELECT = Selector(parse("2:4"), 0.5)


def start(o=24, i=32, p=8, q=16, seed=0):
    stats = stats_of(correlated(width=i, seed=seed))
    return Factors.start(draw(o, i, seed=seed), stats["input_sqnorm"], SELECT, p, q), stats


def layer(o=24, i=32, seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Linear(i, o, bias=bias)


def test_it_starts_at_the_normed_mask():
    """‖W̄·diag(‖x‖)‖² over what the mask of the largest W̄²‖x‖² drops, W̄ with columns, then rows, of norm one."""
    w = draw(24, 32)
    found, stats = start()
    normed = w / w.norm(dim=0)
    normed = normed / normed.norm(dim=1, keepdim=True)
    weight = normed.square() * stats["input_sqnorm"]
    dropped = weight.view(24, 8, 4).sort(-1).values[..., :2].sum()
    assert found.error() == pytest.approx(float(dropped), rel=1e-4)
    left, core, right = found.finish()
    plain = torch.block_diag(*left) @ core @ torch.block_diag(*right)
    torch.testing.assert_close(plain, w * (core != 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_no_update_raises_the_error(seed):
    found, _ = start(seed=seed)
    errors = [found.error()]
    for _ in range(10):
        for update in (found.update_a, found.update_b, found.update_core, found.update_groups):
            update()
            errors.append(found.error())
            kept = found.mask_JKPQ.unflatten(-1, (-1, 4)).sum(-1)
            assert (kept <= 2).all()
            assert not found.core_JKPQ[found.mask_JKPQ == 0].any()
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]


def test_the_wrappers_are_least_squares():
    found, _ = start()
    for update, name in ((found.update_a, "a_JPP"), (found.update_b, "b_KQQ")):
        update()
        blocks = getattr(found, name).clone().requires_grad_()
        setattr(found, name, blocks)
        found.residual().square().sum().backward()
        assert blocks.grad.abs().max() < 1e-2
        setattr(found, name, blocks.detach())


def test_a_group_takes_the_best_of_all_choices():
    """One block pair: brute force over the six masks of the group that changed."""
    found, _ = start(o=8, i=16, p=8, q=16)
    found.update_a()
    found.update_b()
    found.core_JKPQ *= 1 + 0.5 * draw(*found.core_JKPQ.shape)
    before = found.core_JKPQ.clone()
    found.update_groups()
    changed = (found.core_JKPQ != before).nonzero()
    row, first = int(changed[0, 2]), int(changed[0, 3]) // 4 * 4
    others = found.core_JKPQ[0, 0].double().clone()
    others[row, first : first + 4] = 0
    a, b, goal = found.a_JPP[0].double(), found.b_KQQ[0].double(), found.goal_JKPQ[0, 0].double()
    rest = (goal - a @ others @ b).flatten()
    errors = []
    for choice in combinations(range(4), 2):
        columns = torch.stack([torch.outer(a[:, row], b[first + c]).flatten() for c in choice], 1)
        fit = torch.linalg.lstsq(columns, rest[:, None]).solution
        errors.append(float((rest - (columns @ fit)[:, 0]).square().sum()))
    assert found.error() == pytest.approx(min(errors), rel=1e-3)


def test_the_module_computes_the_product_and_beats_its_start():
    module, x = layer(), correlated(width=32)
    w = module.weight.detach().clone()
    made = [armor(module, w, stats_of(x), SELECT, block=16, rounds=rounds) for rounds in (0, 60)]
    for wrapped in made:
        assert isinstance(wrapped, WrappedLinear)
        torch.testing.assert_close(wrapped(x), x @ wrapped.weight.t() + module.bias, rtol=1e-4, atol=1e-4)
        assert parse("2:4").verify(wrapped.core.weight != 0)
    off = [float(error(x, w, wrapped.weight).sum()) for wrapped in made]
    assert off[1] < 0.8 * off[0]


def test_saved_loaded_packed_unpacked(tmp_path):
    model = nn.Sequential(layer(), nn.ReLU(), layer(8, 24, 1, bias=False))
    x = draw(5, 32)
    result = pumice.rewrite(model, {"name": "armor", "block": 8}, data=[correlated(width=32)], progress=False)
    assert set(result.layers) == {"0.weight", "2.weight"}
    truth = model(x)
    path = pumice.save(model, tmp_path / "out", hint="2:4")
    back = pumice.load(path, into=nn.Sequential(layer(seed=5), nn.ReLU(), layer(8, 24, 6, bias=False)))
    assert isinstance(back[0], WrappedLinear)
    assert isinstance(back[0].core, SparseLinear)
    assert back[0].core.layout == "nm"
    torch.testing.assert_close(back(x), truth, rtol=1e-4, atol=1e-5)
    assert pumice.pack(back, progress=False)[0].core.weight.shape == (24, 32)
    torch.testing.assert_close(back(x), truth, rtol=1e-4, atol=1e-5)
    dense = pumice.unpack(back)
    assert [type(m) for m in dense] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(dense(x), truth, rtol=1e-3, atol=1e-4)
    with pytest.raises(PumiceError, match="wrapped"):
        pumice.load(path, into=nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), layer(8, 24, bias=False)))


def test_a_language_model_is_rewritten_and_read_back_by_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny.llama()
    ids = torch.randint(4, 100, (3, 20), generator=torch.Generator().manual_seed(0))
    result = pumice.rewrite(model, {"name": "armor", "block": 16}, data=ids, progress=False)
    assert len(result.layers) == 14
    with torch.no_grad():
        truth = model(ids).logits
    path = pumice.save(model, tmp_path / "out", hint="2:4")
    back = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert isinstance(back.model.layers[0].mlp.up_proj, WrappedLinear)
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, truth, rtol=1e-3, atol=1e-3)
    plain = AutoModelForCausalLM.from_pretrained(pumice.export(model, tmp_path / "dense", format="dense"))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, truth, rtol=1e-3, atol=1e-3)
    back.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
        torch.testing.assert_close(again(ids).logits, truth, rtol=1e-3, atol=1e-3)


def test_a_layer_that_no_data_reaches_stays_and_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(layer(32, 32), layer(8, 32))
            self.unused = layer(8, 32)

        def forward(self, x):
            return self.body(x)

    model = Net()
    result = pumice.rewrite(model, {"name": "armor", "block": 8}, data=[draw(9, 32)], progress=False)
    assert set(result.layers) == {"body.0.weight", "body.1.weight"}
    assert type(model.unused) is nn.Linear
    assert any("unused.weight stays" in note for note in result.notes)


def test_what_cannot_be_is_refused():
    with pytest.raises(PumiceError, match="needs a small N:M"):
        armor(layer(), draw(24, 32), stats_of(correlated(width=32)), Selector(parse("4x4"), 0.5))
    with pytest.raises(PumiceError, match="multiple of 4"):
        armor(layer(24, 32), draw(24, 32), stats_of(correlated(width=32)), SELECT, block=3)
    with pytest.raises(PumiceError, match=r"nn\.Sequential"):
        pumice.rewrite(layer(), "armor", data=[draw(4, 32)])
    with pytest.raises(PumiceError, match="unknown rewrite"):
        pumice.rewrite(nn.Sequential(layer()), "armour", data=[draw(4, 32)])
