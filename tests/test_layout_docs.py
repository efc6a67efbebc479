"""docs/layouts.md is true: its reader reads what Pumice writes, and its example's numbers are what Pumice stores."""

import re
from pathlib import Path

import pytest
import torch

from pumice.weights.layouts.base import pack

DOCS = Path(__file__).resolve().parent.parent / "docs" / "layouts.md"
CASES = [
    ("dense", {}),
    ("bitmask", {}),
    ("nm", {"n": 2, "m": 4}),
    ("nm", {"n": 3, "m": 8}),
    ("nm", {"n": 1, "m": 4}),
    ("block", {"r": 2, "c": 4}),
    ("csr", {}),
]


@pytest.fixture(scope="module")
def reader():
    (source,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    names = {}
    exec(compile(source, str(DOCS), "exec"), names)
    return names["dense"]


def matrix(layout, params, shape=(6, 24), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(shape, generator=generator)
    if layout == "nm":
        rank = torch.rand(shape[0], shape[1] // params["m"], params["m"], generator=generator).argsort(-1).argsort(-1)
        w_OI = w_OI * (rank < params["n"]).flatten(1)
    elif layout != "dense":
        w_OI = w_OI * (torch.rand(shape, generator=generator) < 0.3)
    w_OI[1] = 0
    return w_OI.to(dtype)


@pytest.mark.parametrize(("layout", "params"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reader_of_the_docs_reads_every_layout(reader, layout, params, dtype):
    w_OI = matrix(layout, params, dtype=dtype)
    packed = pack(w_OI, layout, **params)
    assert torch.equal(reader(layout, packed.shape, packed.params, packed.tensors), w_OI)


@pytest.mark.parametrize(
    ("layout", "params", "expected"),
    [
        ("bitmask", {}, {"values": [5, 7, 9], "bitmask": [[146]]}),
        ("nm", {"n": 2, "m": 4}, {"values": [[0, 5, 7, 9]], "codes": [[24]]}),
        ("csr", {}, {"values": [5, 7, 9], "columns": [1, 4, 7], "row_starts": [0, 3]}),
        (
            "block",
            {"r": 1, "c": 4},
            {"values": [[[0, 5, 0, 0]], [[7, 0, 0, 9]]], "columns": [0, 1], "row_starts": [0, 2]},
        ),
    ],
)
def test_the_example_of_the_docs(layout, params, expected):
    packed = pack(torch.tensor([[0.0, 5, 0, 0, 7, 0, 0, 9]]), layout, **params)
    assert {name: tensor.tolist() for name, tensor in packed.tensors.items()} == expected


def test_the_docs_know_every_layout_of_numbers():
    from pumice.core import registry

    text = DOCS.read_text(encoding="utf-8")
    numbers = [info.name for info in registry.layout.members() if not info.obj.coded]
    assert not [name for name in numbers if f"| `{name}`" not in text]
