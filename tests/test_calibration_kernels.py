"""The ops "gram" and "attention" against float64, on every backend that this machine has."""

import math

import pytest
import torch
import torch.nn.functional as F

from pumice.core import dispatch
from pumice.core.dispatch import Call
from pumice.core.precision import products

SIZES = [(1, 1), (3, 7), (0, 5), (5, 65), (130, 64), (257, 130), (33, 200)]


def usable(op: str, dtype: torch.dtype, shape: tuple[int, int]) -> list[dispatch.Backend]:
    call = Call(op, "dense", dtype, "cpu", shape[0], shape)
    return [backend for backend, reason in dispatch.candidates(call) if reason is None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gram_adds_the_upper_triangle(size, dtype):
    tokens, width = size
    torch.manual_seed(0)
    x = torch.randn(tokens, width)
    seen = x.to(dtype) if dtype == torch.bfloat16 else x
    truth = seen.double().t() @ seen.double()
    for backend in usable("gram", dtype, (width, width)):
        total = torch.full((width, width), 2.0)
        run = backend.prepare(total, None)
        run(x)
        run(x)
        exact = 2 * (x.double().t() @ x.double()) if backend.name == "torch" else 2 * truth
        wrong = (total.double() - 2 - exact).triu().abs().max().item() if width else 0.0
        assert wrong <= 1e-5 * max(1.0, exact.abs().max().item()), backend.name


def test_gram_reads_strided_and_half_precision_inputs():
    x = torch.randn(40, 33, dtype=torch.bfloat16).t()
    truth = x.double().t() @ x.double()
    for backend in usable("gram", torch.bfloat16, (40, 40)):
        total = torch.zeros(40, 40)
        backend.prepare(total, None)(x.float())
        torch.testing.assert_close(total.triu().double(), truth.triu(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2), (2, 3, 5, 6), (1, 2, 64, 64), (1, 2, 65, 48), (2, 2, 130, 80), (1, 1, 200, 128)], ids=str
)
def test_attention_is_as_exact_as_pytorch(shape, causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape).mul(1.5).bfloat16() for _ in range(3))
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    theirs = (F.scaled_dot_product_attention(q, k, v, is_causal=causal).double() - truth).abs().max()
    for backend in usable("attention", torch.bfloat16, shape[2:]):
        ours = (backend.prepare((None, causal), None)(q, k, v).double() - truth).abs().max()
        assert ours <= 2 * theirs + 1e-3, backend.name


def test_attention_takes_scale_and_large_scores():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 32).mul(30).bfloat16() for _ in range(3))
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, scale=0.5)
    for backend in usable("attention", torch.bfloat16, (70, 32)):
        out = backend.prepare((0.5, True), None)(q, k, v)
        torch.testing.assert_close(out.double(), truth, rtol=2e-2, atol=0.3)


def test_attention_refuses_odd_heads_and_endless_sequences():
    for shape in ((16, 7), (100_000, 64)):
        assert [b.name for b in usable("attention", torch.bfloat16, shape)] == ["torch"]


@pytest.mark.parametrize(
    "kwargs", [{"is_causal": True}, {}, {"is_causal": True, "enable_gqa": True}, {"attn_mask": True}]
)
def test_products_in_bf16_agree_with_float32(kwargs):
    torch.manual_seed(0)
    kv_heads = 2 if kwargs.get("enable_gqa") else 4
    q = torch.randn(2, 4, 33, 16)
    k, v = torch.randn(2, kv_heads, 33, 16), torch.randn(2, kv_heads, 33, 16)
    if kwargs.get("attn_mask"):
        kwargs = {"attn_mask": torch.rand(33, 33) > 0.3}
    truth = F.scaled_dot_product_attention(q, k, v, **kwargs)
    with torch.no_grad(), products("cpu", torch.bfloat16):
        found = F.scaled_dot_product_attention(q, k, v, **kwargs)
    assert found.shape == truth.shape
    assert (found.float() - truth).abs().max() < 4 * 2**-8 * math.sqrt(16)


def test_products_in_float32_change_nothing():
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    with products("cpu", torch.float32):
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
