"""Every calibration statistic against brute force over the rows that a layer really multiplies its weight with."""

from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from pumice.core.errors import PumiceError
from pumice.core.gradients import model_stats
from pumice.core.stats import LAYER_STATS, Capture, EndOfPass, add_gram, split_needs
from pumice.core.view import find_views
from tests import tiny

EVERYTHING = frozenset(LAYER_STATS)


def collect(model, batches, needs=EVERYTHING, masks=None, **given):
    capture = Capture(find_views(model, ignore=()), frozenset(needs), batches=len(batches), **given)
    with torch.no_grad():
        for index, batch in enumerate(batches):
            capture.next_batch(None if masks is None else masks[index])
            capture.next_call()
            with suppress(EndOfPass), capture:
                model(batch)
    return capture.finish()


def check(found, x_TI, w_OI=None, group=0):
    x = x_TI.double()
    assert torch.allclose(found["input_sqnorm"][group].double(), x.square().mean(0), rtol=1e-5, atol=1e-7)
    assert torch.allclose(found["input_mean"][group].double(), x.mean(0), rtol=1e-5, atol=1e-6)
    assert torch.allclose(found["input_var"][group].double(), x.var(0, unbiased=False), rtol=1e-5, atol=1e-6)
    assert torch.allclose(found["hessian"][group].double(), x.t() @ x / len(x), rtol=1e-4, atol=1e-5)
    sample = found["input"][group]
    assert len(sample) > 0
    assert (torch.cdist(sample.double(), x).min(1).values < 1e-5).all(), "a sampled row is a row of the input"
    if w_OI is not None:
        assert torch.allclose(found["output"][group], sample @ w_OI.t(), atol=1e-5)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), Conv1D(4, 6), nn.Linear(6, 4, bias=False)])
def test_linear_layers(layer):
    batches = [draw(2, 5, 6, seed=s) + 3 for s in range(3)]
    found = collect(layer, batches)["weight"]
    check(found, torch.cat(batches).flatten(0, 1), find_views(layer, ignore=())[0].read())


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(4, 6, 3), (2, 4, 7, 8)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, (1, 3), stride=(1, 2), padding=(0, 1), groups=2), (2, 4, 5, 8)),
        (nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 5, 5)),
        (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(2, 1)), (2, 4, 7, 8)),
        (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 8)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 8)),
        (nn.Conv2d(4, 6, 3), (4, 7, 8)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
        (nn.Conv1d(4, 8, 4, dilation=2, groups=4, padding="same"), (2, 4, 9)),
    ],
)
def test_convolutions(module, shape):
    x = draw(*shape)
    found = collect(module, [x])["weight"]
    view = find_views(module)[0]
    w, groups = view.read(), view.groups
    rows = w.shape[0] // groups
    # The rows are found by what they must do: multiplied with any kernel they give the convolution's output.
    truth = []
    for group in range(groups):
        columns = []
        for index in range(w.shape[1]):
            probe = torch.zeros(groups, rows, w.shape[1])
            probe[group, 0, index] = 1
            with torch.no_grad():
                out = module._conv_forward(x, probe.view(module.weight.shape), None)
            out = out if out.dim() == len(module.weight.shape) else out[None]
            columns.append(out[:, group * rows].flatten())
        truth.append(torch.stack(columns, dim=1))
    for group in range(groups):
        check(found, truth[group], w[group * rows : (group + 1) * rows], group)


class Two(nn.Module):
    """Two layers and how an input reaches them."""

    def __init__(self, first, second, run):
        super().__init__()
        self.first, self.second, self.run = first, second, run

    def forward(self, x):
        return self.run(self, x)


def test_layers_that_read_one_tensor_share_one_accumulator():
    model = Two(nn.Linear(6, 4), nn.Linear(6, 3), lambda m, x: (m.first(x), m.second(x)))
    batches = [draw(5, 6, seed=s) for s in range(2)]
    capture = Capture(find_views(model), EVERYTHING, batches=2)
    for batch in batches:
        capture.next_batch()
        capture.next_call()
        with suppress(EndOfPass), torch.no_grad(), capture:
            model(batch)
    assert len({id(a) for a in capture.accumulators.values()}) == 1
    assert not capture.diverged
    found = capture.finish()
    for view in find_views(model):
        assert capture.accumulators[view.name].count == 10, "counted once"
        check(found[view.name], torch.cat(batches), view.read())


def test_convolutions_of_different_shape_do_not_share():
    run = lambda m, x: (m.first(x), m.second(x))  # noqa: E731
    model = Two(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1, stride=2, bias=False), run)
    x = draw(2, 4, 6, 6)
    found = collect(model, [x])
    check(found["first.weight"], F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1), model.first.weight.flatten(1))
    check(found["second.weight"], x[:, :, ::2, ::2].permute(0, 2, 3, 1).flatten(0, 2))
    strided = Two(nn.Conv2d(4, 6, 3, stride=1), nn.Conv2d(4, 6, 3, stride=2), run)
    found = collect(strided, [x])
    check(found["second.weight"], F.unfold(x, 3, stride=2).transpose(1, 2).flatten(0, 1))


def test_a_tensor_changed_in_place_is_another_input():
    def run(m, x):
        x = x.clone()
        m.first(x)
        return m.second(x.relu_())

    x = draw(20, 6)
    found = collect(Two(nn.Linear(6, 4), nn.Linear(6, 3), run), [x])
    check(found["first.weight"], x)
    check(found["second.weight"], x.relu())


def test_layers_that_share_only_sometimes_are_told_apart():
    def run(m, x):
        m.first(x)
        m.second(x)
        return m.first(x + 1)

    model = Two(nn.Linear(6, 4), nn.Linear(6, 3), run)
    x = draw(20, 6)
    capture = Capture(find_views(model), EVERYTHING, batches=1)
    capture.next_batch()
    capture.next_call()
    with torch.no_grad(), capture:
        model(x)
    assert capture.diverged
    found = collect(model, [x], share=False)
    check(found["first.weight"], torch.cat([x, x + 1]))
    check(found["second.weight"], x)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), Conv1D(4, 6)])
def test_padding_tokens_are_left_out(layer):
    x = draw(3, 5, 6)
    x[0, 3:] = 1000
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, 3:] = 0
    check(collect(layer, [x], masks=[mask])["weight"], x[mask.bool()])


def test_variance_of_an_input_far_from_zero():
    x = draw(4000, 3) * 0.1 + 300
    found = collect(nn.Linear(3, 2), [x], needs={"input_var"})["weight"]
    assert torch.allclose(found["input_var"][0].double(), x.double().var(0, unbiased=False), rtol=1e-3)


def test_only_what_is_asked_for_is_made():
    found = collect(nn.Linear(6, 4), [draw(5, 6)], needs={"input_mean"})["weight"]
    assert set(found) == {"input_mean"}
    assert set(collect(nn.Linear(6, 4), [draw(5, 6)], needs={"output"})["weight"]) >= {"output"}


def test_the_gram_of_wide_inputs_in_panels():
    x = draw(30, 900)
    gram = torch.zeros(900, 900)
    add_gram(gram, x)
    full = torch.triu(gram) + torch.triu(gram, 1).t()
    assert torch.allclose(full, x.t() @ x, atol=1e-4)


def test_multihead_attention_shows_what_its_projection_reads():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = draw(2, 5, 8)
    model = Two(attention, nn.Identity(), lambda m, x: m.first(x, x, x, need_weights=False)[0])
    found = collect(model, [x])["first.out_proj.weight"]
    with torch.no_grad():
        y = attention(x, x, x)[0]
    truth = (y - attention.out_proj.bias) @ torch.linalg.inv(attention.out_proj.weight).t()
    assert torch.allclose(found["hessian"][0], truth.flatten(0, 1).t() @ truth.flatten(0, 1) / 10, atol=1e-4)


def test_fused_experts_see_the_tokens_that_were_sent_to_them():
    torch.manual_seed(0)
    small = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = MixtralConfig(**small, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    config._experts_implementation = "eager"
    experts = MixtralForCausalLM(config).model.layers[0].mlp.experts
    tokens, index = draw(12, 16), torch.randint(0, 3, (12, 2), generator=torch.Generator().manual_seed(0))
    index[:, 1] = (index[:, 0] + 1) % 3
    weights = torch.full((12, 2), 0.5)
    capture = Capture(find_views(experts), EVERYTHING, batches=1)
    capture.next_batch()
    capture.next_call()
    with torch.no_grad(), capture:
        experts(tokens, index, weights)
    found = capture.finish()
    for expert in range(3):
        sent = tokens[(index == expert).any(1)]
        check(found[f"gate_up_proj.{expert}"], sent, experts.gate_up_proj[expert])
        gate, up = (sent @ experts.gate_up_proj[expert].t()).chunk(2, dim=-1)
        check(found[f"down_proj.{expert}"], (F.silu(gate) * up).detach(), experts.down_proj[expert])
    assert "gate_up_proj.3" not in found


def test_nan_and_infinity_in_activations_name_the_layer():
    for value in (float("nan"), float("inf")):
        x = draw(5, 6)
        x[2, 3] = value
        with pytest.raises(PumiceError, match=r"input of layer first\.weight"):
            collect(Two(nn.Linear(6, 4), nn.Identity(), lambda m, x: m.first(x)), [x], needs={"hessian"})


def test_unknown_statistic():
    with pytest.raises(PumiceError, match="did you mean 'hessian'"):
        split_needs(["hesian"])
    assert split_needs(["hessian", "gradient", "random"]) == (frozenset({"hessian"}), frozenset({"gradient"}))


def by_autograd(model, loss, batches):
    out = []
    for batch in batches:
        model.zero_grad()
        loss(model, batch).backward()
        out.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return out


def test_gradient_and_fisher_against_autograd():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), Conv1D(3, 16))
    batches = [draw(5, 2, 4, 4, seed=s) for s in range(3)]

    def loss(m, x):
        return m(x).square().mean()

    running = model[1].running_mean.clone()
    model.eval()
    grads = by_autograd(model, loss, batches)
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[4].weight.grad = torch.ones(16, 3)
    views = find_views(model)
    found = model_stats(model, views, batches, frozenset({"gradient", "fisher_diag"}), loss)
    for view in views:
        every = torch.stack([view.as_matrix(g[view.name]) for g in grads])
        assert torch.allclose(found[view.name]["gradient"], every.mean(0), atol=1e-7)
        assert torch.allclose(found[view.name]["fisher_diag"], every.square().mean(0), atol=1e-9)
    assert torch.equal(model[1].running_mean, running), "calibration changes no running statistics"
    assert (model.training, model[1].training, model[3].training) == (True, False, True)
    assert torch.equal(model[4].weight.grad, torch.ones(16, 3)), "the user's own gradients stay"
    assert not model[0].bias.requires_grad
    assert model[0].weight.grad is None


def test_language_models_bring_their_loss_and_padding_does_not_count():
    model = tiny.llama()
    ids = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    views = find_views(model)
    found = model_stats(model, views, [{"input_ids": ids, "attention_mask": mask}], frozenset({"gradient"}))
    labels = ids.masked_fill(mask == 0, -100)
    (truth,) = by_autograd(model, lambda m, b: m(input_ids=ids, attention_mask=mask, labels=labels).loss, [None])
    for view in views:
        assert torch.allclose(found[view.name]["gradient"], truth[view.name], atol=1e-7)


@pytest.mark.parametrize("batch", [torch.ones(2, 3), {"x": torch.ones(2, 3)}])
def test_a_model_without_loss_says_what_it_needs(batch):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x)

    model = Named()
    with pytest.raises(PumiceError, match="need a loss"):
        model_stats(model, find_views(model), [batch], frozenset({"gradient"}))


def test_a_loss_that_is_not_finite_and_an_encoder_without_head():
    model = nn.Linear(3, 2)
    with pytest.raises(PumiceError, match="the loss is nan"):
        model_stats(
            model, find_views(model), [torch.ones(2, 3)], frozenset({"gradient"}), lambda m, b: m(b).sum() * torch.nan
        )
    bert = tiny.bert()
    with pytest.raises(PumiceError, match="need a loss"):
        model_stats(
            bert, find_views(bert), [{"input_ids": torch.ones(1, 4, dtype=torch.long)}], frozenset({"gradient"})
        )
