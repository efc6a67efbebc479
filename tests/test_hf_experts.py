"""Transformers' MoE models on `experts_implementation="pumice"`: logits and gradients are those of eager."""

import copy

import pytest
import torch

import pumice  # noqa: F401  (registers with Transformers)
from pumice.core.errors import PumiceError
from pumice.kernels import cpu_backend

transformers = pytest.importorskip("transformers")
moe = pytest.importorskip("transformers.integrations.moe")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "head_dim": 8,
    },
    "olmoe": {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}


def tiny(name, dtype=torch.float32):
    config = transformers.AutoConfig.for_model(name, **{**SMALL, **CONFIGS[name]})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def logits_and_gradients(model, ids):
    model.zero_grad()
    out = model(ids).logits
    out.float().square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_eager(name):
    model = tiny(name)
    ids = torch.randint(1, 64, (2, 11))
    ours = copy.deepcopy(model)
    ours.set_experts_implementation("pumice")
    logits, gradients = logits_and_gradients(model, ids)
    logits_ours, gradients_ours = logits_and_gradients(ours, ids)
    torch.testing.assert_close(logits_ours, logits, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == gradients_ours.keys()
    for key, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients_ours[key], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7)
    for length in (1, 11):
        with torch.no_grad():
            torch.testing.assert_close(
                ours(ids[:, :length]).logits, model(ids[:, :length]).logits, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("name", CONFIGS)
def test_known_gates_run_fused(name):
    from pumice.moe.hf import known_form

    model = tiny(name)
    forms = {known_form(m) for m in model.modules() if type(m).__name__.endswith("Experts")}
    wanted = ("clamped_swish", "pairs", 1.702, 7.0) if name == "gpt_oss" else ("silu", "halves", 0.0, 0.0)
    assert forms == {wanted}


@pytest.mark.parametrize("instructions", [k for k, why in cpu_backend.instruction_sets().items() if why is None])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_bfloat16_is_as_close_to_float32_as_eager_is(name, instructions):
    model = tiny(name, torch.bfloat16)
    ids = torch.randint(1, 64, (1, 7))
    cpu_backend.force(instructions)
    try:
        for module in model.modules():
            if type(module).__name__.endswith("Experts"):
                x = torch.randn(9, 32, dtype=torch.bfloat16)
                index = torch.rand(9, 4).argsort(1)[:, :2]
                weight = torch.rand(9, 2, dtype=torch.bfloat16)
                wide = copy.deepcopy(module).float()
                with torch.no_grad():
                    truth = wide(x.float(), index, weight.float())
                    theirs = (module(x, index, weight).float() - truth).abs().max()
                    ours = (moe.ALL_EXPERTS_FUNCTIONS["pumice"](module, x, index, weight).float() - truth).abs().max()
                assert ours <= 2 * theirs + 1e-6
        model.set_experts_implementation("pumice")
        with torch.no_grad():
            assert torch.isfinite(model(ids).logits).all()
    finally:
        cpu_backend.force(None)


def test_a_gate_of_ones_own_runs_as_it_is():
    model = tiny("mixtral")
    experts = next(m for m in model.modules() if type(m).__name__ == "MixtralExperts")
    experts._apply_gate = lambda both: both[..., : both.shape[-1] // 2] * 3.0
    experts.__dict__.pop("_pumice_form", None)
    x, index, weight = torch.randn(5, 32), torch.rand(5, 4).argsort(1)[:, :2], torch.rand(5, 2)
    y = moe.ALL_EXPERTS_FUNCTIONS["pumice"](experts, x, index, weight)
    theirs = moe.batched_mm_experts_forward(experts, x, index, weight)
    torch.testing.assert_close(y, theirs, rtol=1e-4, atol=1e-5)


def test_plain_experts_and_foreign_ranks():
    class Plain(torch.nn.Module):
        has_gate, has_bias, has_post_expert_norm, is_transposed, _is_expert_parallel = False, False, True, False, True

        def __init__(self):
            super().__init__()
            self.num_experts = 3
            self.up_proj = torch.nn.Parameter(torch.randn(3, 12, 8))
            self.down_proj = torch.nn.Parameter(torch.randn(3, 8, 12))
            self.act_fn = torch.nn.ReLU()
            self.post_expert_norm = torch.nn.LayerNorm(8)

    experts = Plain()
    x, index, weight = torch.randn(6, 8), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    weight[index == 3] = 0
    theirs = moe.batched_mm_experts_forward(experts, x, index, weight)
    torch.testing.assert_close(moe.ALL_EXPERTS_FUNCTIONS["pumice"](experts, x, index, weight), theirs)
    experts.has_post_expert_norm = False
    theirs = moe.batched_mm_experts_forward(experts, x, index, weight)
    torch.testing.assert_close(moe.ALL_EXPERTS_FUNCTIONS["pumice"](experts, x, index, weight), theirs)


def test_packed_weights_are_refused_by_name():
    model = tiny("mixtral")
    experts = next(m for m in model.modules() if type(m).__name__ == "MixtralExperts")
    experts.down_proj = torch.nn.Parameter(torch.zeros(4, 32, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(PumiceError, match="down_proj"):
        moe.ALL_EXPERTS_FUNCTIONS["pumice"](experts, torch.randn(2, 32), torch.zeros(2, 1).long(), torch.ones(2, 1))


@pytest.mark.parametrize("layout", [None, "bitmask", "csr"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_packed_experts_of_a_model_give_its_logits(name, layout):
    from pumice.moe.hf import pack_experts

    model = tiny(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("gate_up_proj", "down_proj")):
                parameter.mul_(torch.rand(parameter.shape) < 0.3)
        ids = torch.randint(1, 64, (2, 5))
        dense = model(ids).logits
        assert pack_experts(model, layout=layout) == 2
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-4)
    stored = [m.packed.layout for m in model.modules() if type(m).__name__ == "SparseLinear"]
    assert len(stored) == 2 * 2 * 4
    assert set(stored) == {layout or "bitmask"}
