"""Weights in huge pages: what is asked of the system, and that nothing of the weights changes."""

import pytest
import torch
from torch import nn

from pumice.engine import pages


def test_neighbours_share_a_range():
    arena = torch.zeros(1 << 20, dtype=torch.uint8)
    first, second, far = arena[:1000], arena[1064:5000], arena[500_000:600_000]
    at = arena.data_ptr()
    assert pages.ranges([far, second, first, first[:0]]) == [(at, at + 5000), (at + 500_000, at + 600_000)]
    assert pages.ranges([torch.empty(4, device="meta")]) == []


def test_weights_stay_what_they_are():
    model = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 1024)).bfloat16()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    size, gathered = pages.page_size(), pages.gather_weights(model)
    assert gathered == 0 if size is None else gathered % size == 0
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])


@pytest.mark.parametrize("setting", ["always madvise [never]", None, "[madvise]"])
def test_the_administrator_decides(monkeypatch, tmp_path, setting):
    monkeypatch.setattr(pages, "SETTINGS", tmp_path)
    monkeypatch.setattr(pages.sys, "platform", "linux")
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
        (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    assert pages.page_size() == (2 << 20 if setting == "[madvise]" else None)
    monkeypatch.setattr(pages.sys, "platform", "darwin")
    assert pages.page_size() is None
