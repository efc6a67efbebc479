"""Similarity- and attention-aware routing: logits are averaged over tokens, which makes choices steadier."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import RouteContext
from tests.methods.moe_parts import D, E, draw, layer, router, tokens


def test_a_low_temperature_is_the_plain_router():
    x = tokens()
    x = x / x.norm(dim=1, keepdim=True)
    made = router("similarity", temperature=1e-4)
    torch.testing.assert_close(made(x, RouteContext()).logits_TE, x @ made.weight_ED.t())


def test_a_high_temperature_gives_a_sequence_one_decision():
    moe = layer({"name": "similarity", "temperature": 1e6})
    moe(tokens().view(2, 20, D))
    logits = moe.plan.routing.logits_TE.view(2, 20, E)
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(logits[0, 0], logits[1, 0])


def test_segments_and_batches_mix_alike_and_apart():
    made, x = router("similarity"), tokens()
    segment = torch.arange(2).repeat_interleave(20)
    listed = made(x, RouteContext(segment_T=segment)).logits_TE
    batched = made(x, RouteContext(segment_T=segment, batch=2, seqlen=20)).logits_TE
    alone = torch.cat([made(part, RouteContext()).logits_TE for part in x.split(20)])
    torch.testing.assert_close(listed, alone)
    torch.testing.assert_close(batched, alone)


def test_causal_mixing_ignores_later_tokens():
    made, x = router("similarity", causal=True), tokens()
    torch.testing.assert_close(made(x, RouteContext()).logits_TE[:10], made(x[:10], RouteContext()).logits_TE)


def test_noise_flips_fewer_choices_than_of_the_plain_router():
    centres = 3 * draw(4, D, seed=3)
    x = centres.repeat_interleave(25, 0) + 0.3 * draw(100, D, seed=4)
    noisy = x + 0.3 * draw(100, D, seed=5)
    flips = {}
    for name in ("similarity", "linear"):
        made = router(name)
        with torch.no_grad():
            made.weight_ED.copy_(draw(E, D, seed=6))
        one, two = (made(y, RouteContext()).logits_TE.argmax(1) for y in (x, noisy))
        flips[name] = int((one != two).sum())
    assert flips["similarity"] < flips["linear"]


def test_attention_mixes_by_the_mean_of_the_heads():
    made, x = router("attention"), tokens()
    attention = draw(2, 3, 20, 20, seed=9).softmax(-1)
    plain = (x @ made.weight_ED.t()).view(2, 20, E)
    wanted = torch.einsum("bhqk,bke->bqe", attention, plain) / 3
    torch.testing.assert_close(made(x, RouteContext(attention_BHQK=attention)).logits_TE, wanted.flatten(0, 1))
    itself = torch.eye(20).expand(2, 3, 20, 20)
    torch.testing.assert_close(made(x, RouteContext(attention_BHQK=itself)).logits_TE, plain.flatten(0, 1))


def test_bad_input():
    with pytest.raises(PumiceError, match="attention_BHQK=None"):
        router("attention")(tokens(), RouteContext())
    with pytest.raises(PumiceError, match="for 40 tokens"):
        router("attention")(tokens(), RouteContext(attention_BHQK=torch.ones(1, 1, 20, 20)))
    with pytest.raises(PumiceError, match="temperature=0"):
        router("similarity", temperature=0)
