"""MoE layers whose experts are stored sparse: outputs and gradients are those of the dense experts."""

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.moe import MoE
from pumice.moe.experts.packed import PackedExperts


@pytest.mark.parametrize("kind", ["swiglu", "mlp"])
@pytest.mark.parametrize("layout", ["bitmask", "csr", "dense", None])
def test_a_layer_runs_from_packed_experts(kind, layout):
    torch.manual_seed(0)
    layer = MoE(32, 48, experts=4, top_k=2, shared=0, kind={"name": kind, "bias": True})
    with torch.no_grad():
        for name, parameter in layer.experts.named_parameters():
            parameter.normal_()
            if parameter.dim() == 3:
                parameter.mul_(torch.rand(parameter.shape) < 0.3)
            assert "proj" in name
    x = torch.randn(7, 32, requires_grad=True)
    dense = layer(x)
    dense.square().sum().backward()
    gradient, x.grad = x.grad.clone(), None
    packed = PackedExperts.of(layer.experts, layout=layout)
    if layout != "dense":
        assert packed.nbytes < sum(p.nbytes for p in layer.experts.parameters() if p.dim() == 3) / 2 * (
            1 + (layout == "csr")
        )
    layer.experts = packed
    sparse = layer(x)
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)
    sparse.square().sum().backward()
    torch.testing.assert_close(x.grad, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())
    assert layer(x[:0]).shape == (0, 32)


def test_what_cannot_be_packed_or_merged_is_refused():
    layer = MoE(8, 16, experts=2, top_k=1, shared=0)
    with pytest.raises(PumiceError, match="unknown layout"):
        PackedExperts.of(layer.experts, layout="nothing")
    packed = PackedExperts.of(layer.experts)
    with pytest.raises(PumiceError, match="only swiglu and mlp"):
        PackedExperts.of(packed)
