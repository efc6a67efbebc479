"""Mobile V-MoE: one decision an image, and super-classes that a confusion matrix gives."""

import pytest
import torch
import torch.nn.functional as F

from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.moe import MoE, RouteContext
from pumice.moe.balance.superclass import superclasses
from tests.methods.moe_parts import D, E, draw, tokens


def confusion(groups, inside=10.0, outside=0.5):
    same = torch.tensor(groups)[:, None] == torch.tensor(groups)
    noise = draw(len(groups), len(groups), seed=3).abs() * outside
    return torch.where(same, inside, 0.0) + noise + 100 * torch.eye(len(groups))


def test_finds_planted_super_classes():
    groups = [0, 1, 2, 3] * 3
    expert = superclasses(confusion(groups), 4)
    for g in range(4):
        mine = expert[torch.tensor(groups) == g]
        assert (mine == mine[0]).all()
    assert torch.bincount(expert).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(("classes", "experts"), [(10, 4), (7, 3), (3, 8), (12, 5)])
def test_super_classes_are_of_even_size(classes, experts):
    count = torch.bincount(superclasses(draw(classes, classes).abs(), experts), minlength=experts)
    assert count.sum() == classes
    assert count.max() <= -(-classes // experts)


def make():
    torch.manual_seed(0)
    return MoE.from_recipe(
        "mobile-v-moe", D, 8, experts=E, balance=[{"name": "superclass", "classes": 20, "weight": 1.0}]
    )


def images():
    return tokens(24).view(4, 6, D)


def test_all_patches_of_an_image_go_to_one_expert():
    moe = make()
    moe(images(), RouteContext(labels_G=torch.arange(4)))
    expert = moe.plan.expert_A[moe.plan.token_A.argsort()].view(4, 6)
    assert torch.equal(expert, expert[:, :1].expand_as(expert))


def test_the_loss_is_cross_entropy_of_the_image():
    moe, labels = make(), torch.tensor([3, 8, 11, 19])
    moe(images(), RouteContext(labels_G=labels))
    logits = images().mean(1) @ moe.router.weight_ED.t()
    torch.testing.assert_close(moe.aux_loss, F.cross_entropy(logits, labels % E))


def test_supervision_alone_teaches_the_router():
    moe, labels = make(), torch.tensor([3, 8, 11, 19])
    moe.balance[0].fit(confusion([0, 1, 2, 3, 4] * 4))
    optimizer = torch.optim.Adam(moe.router.parameters(), lr=0.1)
    for _ in range(25):
        moe(images(), RouteContext(labels_G=labels))
        optimizer.zero_grad()
        moe.aux_loss.backward()
        optimizer.step()
    chosen = moe.plan.expert_A[moe.plan.token_A.argsort()].view(4, 6)[:, 0]
    assert torch.equal(chosen, moe.balance[0].expert_C[labels])


def test_bad_input():
    made = registry.balance.bind({"name": "superclass", "classes": 5})(D, E)
    with pytest.raises(PumiceError, match="classes=5"):
        made.fit(torch.ones(4, 4))
    moe = make()
    with pytest.raises(PumiceError, match="labels_G=None"):
        moe(images())
    with pytest.raises(PumiceError, match="labels up to 20"):
        moe(images(), RouteContext(labels_G=torch.tensor([0, 1, 2, 20])))
    with pytest.raises(PumiceError, match="3 entries for 4"):
        moe(images(), RouteContext(labels_G=torch.arange(3)))
