"""What follows a convolution is found by running the model once, and only what nothing else reads counts."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pumice
from pumice.core.calls import tensors
from pumice.engine.conv_sites import look
from tests.test_convolve import Branching, agree, clock, lively

pytestmark = pytest.mark.usefixtures("measured_here")


def test_look_tells_what_follows_each_convolution():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1), nn.Tanh(), nn.ReLU()
    ).eval()
    found = look(net, torch.randn(2, 3, 8, 8))
    first, second = found.sites
    assert (first.name, first.module, first.shape) == ("0", net[0], (2, 3, 8, 8))
    assert (first.norm, first.activation, first.clamp) == (net[1], net[2], (0.0, 6.0))
    assert (second.name, second.shape, second.norm, second.activation) == ("4", (2, 4, 3, 3), None, None)
    assert second.clamp == (-math.inf, math.inf)
    assert found.activations == [net[6]]
    assert found.pools == [(net[3], (2, 4, 6, 6))]


def kept_before_the_norm(m, x):
    y = m.conv(x)
    return m.relu(m.bn(y)), y


def viewed_before_the_norm(m, x):
    y = m.conv(x)
    return m.relu(m.bn(y)) + y.mT.mT


def data_before_the_relu(m, x):
    y = m.bn(m.conv(x))
    return m.relu(y) - y.data


def two_norms(m, x):
    y = m.conv(x)
    return m.relu(m.bn(y)) + m.other(y)


def two_norms_by_keyword(m, x):
    y = m.conv(x)
    return m.relu(m.bn(y)) + m.other(input=y)


def all_by_keyword(m, x):
    return m.relu(input=m.bn(input=m.conv(input=x)))


def changed_in_place(m, x):
    y = m.conv(x)
    y += 1
    return m.relu(m.bn(y))


def copied_then_changed(m, x):
    y = m.bn(m.conv(x))
    z = y.clone()
    return F.relu_(y) + m.relu(z)


def read_again_later(m, x):
    y = m.conv(x)
    z = m.relu(y)
    return z + m.bn(y)


def read_as_a_slice(m, x):
    y = m.conv(x)
    part = y[:, :2]
    return m.relu(m.bn(y))[:, :2] + part


def in_a_list(m, x):
    y = m.conv(x)
    return torch.cat([m.relu(m.bn(y)), y], 1)


@dataclass
class Both:
    """An output that is no tuple and no mapping."""

    first: torch.Tensor
    second: torch.Tensor


def in_an_object(m, x):
    y = m.conv(x)
    return Both(m.relu(m.bn(y)), y)


def in_an_object_before_the_relu(m, x):
    y = m.bn(m.conv(x)) * 2
    return Both(m.relu(y), y)


@torch.jit.script
def doubled(y):
    return y * 2


def read_by_a_script(m, x):
    y = m.conv(x)
    return m.relu(m.bn(y)), doubled(y)


def relu_before_the_convolution(m, x):
    return m.bn(m.conv(m.relu(x * 2)))


JOINS = (
    kept_before_the_norm, viewed_before_the_norm, data_before_the_relu, two_norms, two_norms_by_keyword, all_by_keyword,
    changed_in_place, copied_then_changed, read_again_later, read_as_a_slice, in_a_list, in_an_object,
    in_an_object_before_the_relu, read_by_a_script, relu_before_the_convolution,
)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("join", JOINS)
def test_only_what_nothing_else_reads_is_fused(join, monkeypatch):
    clock("torch", monkeypatch)
    net = lively(Branching(join))
    x = torch.randn(2, 3, 7, 6)
    packed = pumice.pack(copy.deepcopy(net), example=x, progress=False)
    ours, theirs = packed(x), net(x)
    if isinstance(ours, Both):
        ours, theirs = vars(ours), vars(theirs)
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        agree(a, b)
