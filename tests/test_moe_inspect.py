"""`pumice moe inspect`: what is counted is what the router chose."""

import json

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from pumice.analyze import experts
from pumice.cli import main
from pumice.core.errors import PumiceError
from pumice.moe import MoE
from tests import tiny


def mixtral(vocabulary=64):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return MixtralForCausalLM(config).eval()


def test_counts_are_those_of_the_router():
    model = mixtral()
    ids = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits
    found = experts.inspect_experts(model, [{"input_ids": ids}], progress=False)
    assert found.tokens == 30 and len(found.layers) == 2
    for layer, scores in zip(found.layers, logits, strict=True):
        chosen = scores.topk(2, 1).indices
        assert layer.load_E.tolist() == torch.bincount(chosen.flatten(), minlength=4).tolist()
        pairs = [bool(set(chosen[t].tolist()) & set(chosen[t - 1].tolist())) for t in range(1, 30) if t % 10]
        assert (layer.repeats, layer.neighbours) == (sum(pairs), len(pairs))
        share = scores.softmax(1).gather(1, chosen)
        assert layer.first == pytest.approx(float((share.amax(1) / share.sum(1)).sum()), rel=1e-4)


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed, self.moe = nn.Embedding(12, 8), MoE(8, 8, experts=3, shared=0, **options)

    def forward(self, input_ids):
        return self.moe(self.embed(input_ids))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"router": "slots", "assign": "soft"}, {"assign": "merge"}], ids=str)
def test_pumice_layers_and_soft_plans(options):
    torch.manual_seed(0)
    net = Net(**options)
    ids = torch.randint(0, 12, (2, 5))
    (layer,) = experts.inspect_experts(net, [{"input_ids": ids}], progress=False).layers
    torch.testing.assert_close(layer.load_E, net.moe.plan.load_E.double(), check_dtype=False)
    assert layer.tokens_N.sum() == 10


def test_specialisation_is_one_where_the_expert_tells_the_kind_and_zero_where_it_does_not():
    usage = experts.Usage("x", 6)
    usage.count_NE += 3 * torch.eye(6, dtype=torch.float64)
    assert usage.specialisation == pytest.approx(1)
    usage.count_NE = torch.ones(6, 6, dtype=torch.float64)
    assert usage.specialisation == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        ("Ġthe", "word"), ("▁The", "word"), ("The", "word"), ("ing", "continuation"), ("##s", "continuation"),
        ("Ġ12", "number"), (",", "punctuation"), ("Ġ", "space"), ("Ċ", "space"), (None, "other"),
    ],
)  # fmt: skip
def test_kinds_of_tokens(piece, kind):
    assert experts.KINDS[experts._kind(piece)] == kind


def test_a_dense_model_is_refused():
    with pytest.raises(PumiceError, match="no mixture of experts"):
        experts.inspect_experts(tiny.llama(), [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}], progress=False)
    with pytest.raises(PumiceError, match="batches"):
        experts.inspect_experts(mixtral(), [])


def test_command(tmp_path, capsys):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    mixtral(100).save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    text.write_text(tiny.words(300))
    arguments = ["moe", "inspect", str(model), "--data", str(text), "--samples", "2", "--seqlen", "32"]
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "busiest" in shown and (tmp_path / "out" / "inspect.json").exists()
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--json"])
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 2
