"""EvoMoE: experts begin as masked copies of one, and a cooling gate goes from all of them to few."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext
from pumice.moe.grow import spawn
from pumice.moe.route.dts import DenseToSparse

D, E = 8, 8


def made():
    torch.manual_seed(0)
    return MoE(D, 8, E, "dts", {"name": "threshold", "above": 0.001, "least": 1}, shared=0)


def test_the_weights_are_a_tempered_softmax_and_noise_is_gumbel():
    torch.manual_seed(0)
    router, x = DenseToSparse(D, E), torch.randn(6, D)
    logits = x @ router.weight_ED.t()
    torch.testing.assert_close(router(x, RouteContext()).weight_TE, (logits / 0.3).softmax(1))
    for progress, temperature in ((0.0, 2.0), (0.5, 1.15), (1.0, 0.3)):
        assert router.temperature(RouteContext(training=True, progress=progress)) == pytest.approx(temperature)
    assert router.temperature(RouteContext(training=True)) == 2.0
    many = x[:1].expand(20000, D)
    context = RouteContext(training=True, progress=1.0, generator=torch.Generator().manual_seed(0))
    winner = router(many, context).weight_TE.argmax(1)
    frequency = torch.bincount(winner, minlength=E) / 20000
    # The largest of logits plus Gumbel noise is a sample of the softmax of the logits.
    torch.testing.assert_close(frequency, logits[0].softmax(0).detach(), atol=0.015, rtol=0)


def test_routing_starts_with_all_experts_and_ends_with_few():
    layer, x = made(), torch.randn(200, D)
    with torch.no_grad():
        layer.router.weight_ED.mul_(4)
    used = []
    for progress in (0.0, 0.3, 0.6, 0.9, 1.0):
        layer(x, RouteContext(progress=progress, generator=torch.Generator().manual_seed(0)))
        used.append(layer.plan.statistics()["per_token"])
    assert used == sorted(used, reverse=True)
    assert used[0] > 6
    assert used[-1] < 2.5
    layer.eval()
    assert torch.equal(layer(x), layer(x)), "no noise in use"
    by_top_1 = MoE(D, 8, layer.experts, "dts", "token_choice", top_k=1, shared=0)
    by_top_1.load_state_dict(layer.state_dict())


def test_copies_lose_different_weights_and_keep_the_rest():
    torch.manual_seed(0)
    one = MoE(D, 16, 1, "linear", top_k=1, shared=0, kind={"name": "mlp", "bias": True})
    with torch.no_grad():
        one.experts.up_proj_bias.normal_()
    many = spawn(one.experts, 5, masked=0.25, generator=torch.Generator().manual_seed(0))
    for name, weight in many.weights().items():
        source = one.experts.weights()[name]
        assert weight.shape == (5, *source.shape[1:])
        kept = weight != 0
        assert torch.equal(weight, torch.where(kept, source.expand_as(weight), 0))
        if weight.dim() == 3:
            assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.05)
            assert not torch.equal(kept[0], kept[1])
        else:
            assert torch.equal(weight, source.expand_as(weight))
    x = torch.randn(3, D)
    exact = MoE(D, 16, spawn(one.experts, 4, masked=0.0), "dts", "threshold", shared=0).eval()
    torch.testing.assert_close(exact(x), one.experts.every(x)[:, 0], atol=1e-6, rtol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(PumiceError, match="copies one expert"):
        spawn(made().experts, 4)
    with pytest.raises(PumiceError, match="masked=1"):
        spawn(MoE(D, 8, 1, top_k=1, shared=0).experts, 4, masked=1.0)
    with pytest.raises(PumiceError, match=r"cold=3"):
        DenseToSparse(D, E, cold=3.0)
