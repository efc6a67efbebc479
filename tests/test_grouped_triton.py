"""The Triton kernels of grouped products, in Triton's interpreter: as exact as plain PyTorch, over odd sizes.

Triton decides at import whether it interprets, so everything of that kind runs in one process of its own.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from pumice.core import dispatch
from pumice.core.dispatch import Call
from pumice.kernels import grouped_triton

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

PROGRAM = """
import itertools
import torch
from pumice.core import dispatch
from pumice.core.dispatch import Call
from pumice.kernels import grouped, reference
from pumice.kernels.triton import grouped as ours

# Tokens, assignments, experts, outputs, inputs: one of each, empty experts, no assignment, tails of every tile.
SIZES = [(1, 1, 1, 1, 1), (5, 9, 4, 40, 33), (7, 0, 2, 5, 6), (20, 70, 3, 66, 50), (9, 200, 1, 7, 3)]


def plan(tokens, assignments, experts):
    expert_A = torch.randint(experts, (assignments,)).sort().values
    expert_A[expert_A == 1] = 0  # expert 1 has nothing
    offsets = torch.searchsorted(expert_A, torch.arange(experts + 1))
    return torch.randint(tokens, (assignments,)), offsets, torch.rand(assignments)


def no_worse(found, theirs, truth, dtype):
    assert found.shape == truth.shape and found.dtype == dtype
    if truth.numel():
        least = 1e-6 if dtype == torch.float32 else 1e-3
        assert torch.isfinite(found).all()
        worst = (found.double() - truth).abs().max()
        assert worst <= 2 * (theirs.double() - truth).abs().max() + least, (worst, dtype, truth.shape)


def double(tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


for dtype, size in itertools.product((torch.float32, torch.bfloat16), SIZES):
    tokens, assignments, experts, outputs, inputs = size
    torch.manual_seed(0)
    token_A, offsets, scale = plan(tokens, assignments, experts)
    bias = torch.randn(experts, outputs).to(dtype)
    x_RI = torch.randn(tokens, inputs).to(dtype)
    for transposed, gather, scatter in itertools.product((False, True), repeat=3):
        shape = (experts, inputs, outputs) if transposed else (experts, outputs, inputs)
        weight = (torch.randn(shape) * inputs**-0.5).to(dtype)
        weight = weight.transpose(1, 2) if transposed else weight
        x = x_RI if gather else torch.randn(assignments, 2 * inputs).to(dtype)[:, ::2]
        more = (token_A if gather else None, token_A if scatter else None, scale if scatter else None)
        args = (x, weight, offsets, bias if transposed else None, *more, tokens if scatter else 0)
        truth, theirs = reference.grouped_linear(*double(args[:-1]), args[-1]), reference.grouped_linear(*args)
        no_worse(ours.linear(*args), theirs, truth, dtype)
        g = torch.randn(tokens, outputs).to(dtype) if scatter else torch.randn(assignments, outputs).to(dtype)
        args = (g, x, offsets, token_A if scatter else None, token_A if gather else None)
        no_worse(ours.outer(*args), reference.grouped_outer(*args), reference.grouped_outer(*double(args)), dtype)

# The whole op with gradients, every product of it in Triton.
def choose(op, like, rows, experts, shape):
    call = Call(op, "dense", like.dtype, str(like.device), rows, shape, {"experts": experts})
    assert dispatch.get(op, "dense", "triton").refuse(call) is None
    used.append(op)
    return dispatch.get(op, "dense", "triton")


usual, used = grouped.choose, []
torch.manual_seed(1)
token_A, offsets, scale = plan(6, 19, 3)
tensors = [torch.randn(6, 5), torch.randn(3, 7, 5), torch.randn(3, 7), scale]
results = []
for chosen in (usual, choose):
    grouped.choose = chosen
    x, weight, bias, s = (t.clone().requires_grad_() for t in tensors)
    y = grouped.grouped_linear(x, weight, offsets, bias, token_A, token_A, s, 6)
    y.square().sum().backward()
    results.append([y.detach(), x.grad, weight.grad, bias.grad, s.grad])
for a, b in zip(*results, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
assert set(used) == {"grouped_linear", "grouped_outer"}, used
print("all equal")
"""


@needs_triton
def test_every_product_is_as_exact_as_plain_pytorch():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("all equal")


COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pumice.kernels.triton import grouped

TILES = {"TILE_A": 64, "TILE_O": 64, "TILE_I": 32, "WIDE": False}
INDEX, HALF = "*i64", "*bf16"
linear = dict(x=HALF, weight=HALF, bias=HALF, out="*fp32", gather=INDEX, scatter=INDEX, scale="*fp32")
linear |= dict.fromkeys(("expert_N", "first_N", "offsets_E1"), INDEX)
linear |= dict.fromkeys(("experts", "outputs", "inputs", "x_row", "x_column"), "i32")
linear |= dict.fromkeys(("weight_expert", "weight_output", "weight_input"), "i32")
plain = linear | {"out": HALF} | dict.fromkeys(("bias", "gather", "scatter", "scale"), "constexpr")
outer = dict(g=HALF, x=HALF, out=HALF, g_rows=INDEX, x_rows=INDEX, offsets_E1=INDEX)
outer |= dict.fromkeys(("outputs", "inputs", "g_row", "g_column", "x_row", "x_column"), "i32")
for kernel, signature in (
    (grouped._linear_kernel, linear),
    (grouped._linear_kernel, plain),
    (grouped._outer_kernel, outer),
):
    constants = TILES | {name: None for name, kind in signature.items() if kind == "constexpr"}
    source = ASTSource(kernel, signature | dict.fromkeys(TILES, "constexpr"), constants)
    assert compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]
print("compiled")
"""


@needs_triton
def test_the_kernels_compile_for_a_gpu(tmp_path):
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment = {**kept, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]


@needs_triton
def test_tiles_cover_every_assignment_once():
    from pumice.kernels.triton.grouped import tiles

    offsets = torch.tensor([0, 5, 5, 38, 40])
    expert_N, first_N = tiles(offsets, 40, 16)
    found = [
        (expert, place)
        for expert, first in zip(expert_N.tolist(), first_N.tolist(), strict=True)
        if expert < 4
        for place in range(first, min(first + 16, int(offsets[expert + 1])))
    ]
    assert found == [(0, p) for p in range(5)] + [(2, p) for p in range(5, 38)] + [(3, 38), (3, 39)]


def test_it_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call = Call("grouped_linear", "dense", torch.float32, "cpu", 4, (8, 8), {"experts": 2})
    reasons = {backend.name: why for backend, why in dispatch.candidates(call)}
    assert reasons["triton"] == "Triton kernels need a CUDA device, not cpu"
    there = Call("grouped_linear", "dense", torch.float32, "cuda", 4, (8, 8), {"experts": 2})
    monkeypatch.setattr(grouped_triton, "_installed", lambda: False)
    assert "pip install 'pumice[triton]'" in {b.name: why for b, why in dispatch.candidates(there)}["triton"]
    monkeypatch.setattr(grouped_triton, "_installed", lambda: True)
    wide = Call("grouped_linear", "dense", torch.float64, "cuda", 4, (8, 8), {"experts": 2})
    assert "float64" in dispatch.get("grouped_linear", "dense", "triton").refuse(wide)
    assert dispatch.get("grouped_linear", "dense", "triton").refuse(there) is None
