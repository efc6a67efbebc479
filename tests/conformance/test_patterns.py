"""Every pattern of the registry selects legal masks of the right count, keeps the best, and refuses what does not fit."""

import math

import pytest
import torch

from pumice.core import registry, select
from pumice.core.errors import PumiceError
from pumice.weights.layouts.base import pack, pack_smallest, unpack
from pumice.weights.patterns.base import Pattern, parse

TEXTS = [text for info in registry.family("pattern").members() for text in info.obj.examples]
SHAPE = (64, 96)


def scores(seed=0):
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))


def wanted(pattern):
    try:
        return pattern.density(0.25)
    except PumiceError:
        return pattern.density(None)


@pytest.mark.parametrize("text", TEXTS)
def test_selects_a_legal_mask_of_the_asked_density(text):
    pattern = parse(text)
    density = wanted(pattern)
    pattern.check_shape("layer", *SHAPE, density)
    mask = pattern.select(scores(), density)
    assert mask.dtype == torch.bool
    assert mask.shape == SHAPE
    assert pattern.verify(mask)
    assert abs(mask.float().mean() - density) < 1e-6
    assert torch.equal(mask, pattern.select(scores(), density))


@pytest.mark.parametrize("text", TEXTS)
def test_text_reads_back(text):
    assert parse(parse(text).text) == parse(text)
    assert parse(parse(text)) == parse(text)
    assert isinstance(parse(text), Pattern)
    assert parse(text).scope in {"row", "layer", "global"}


@pytest.mark.parametrize("text", TEXTS)
def test_full_density_keeps_everything_and_nothing_is_legal(text):
    pattern = parse(text)
    if not text[0].isdigit() or "x" in text:
        assert pattern.select(scores(), 1.0).all()
    assert pattern.verify(torch.zeros(SHAPE, dtype=torch.bool))


@pytest.mark.parametrize("text", TEXTS)
def test_keeps_what_stands_out(text):
    pattern = parse(text)
    high = scores() * 0.01
    high[:16, :32] += 1
    mask = pattern.select(high, wanted(pattern))
    assert mask[:16, :32].float().mean() >= mask.float().mean()
    assert (high * mask).sum() >= (high * pattern.select(scores(7), wanted(pattern))).sum()


@pytest.mark.parametrize("text", [text for text in TEXTS if not text.startswith("unstructured")])
def test_verify_rejects_an_illegal_mask(text):
    pattern = parse(text)
    mask = pattern.select(scores(), wanted(pattern))
    broken = mask.clone()
    first = int((~broken).flatten().nonzero()[0])
    broken.view(-1)[first] = True
    assert not pattern.verify(broken)


@pytest.mark.parametrize("text", TEXTS)
def test_decides_group_by_group_where_it_says_so(text):
    pattern = parse(text)
    width = pattern.group_columns
    if width is None:
        pytest.skip("needs the whole matrix")
    width = math.lcm(width, 8)
    parts = [pattern.select(part, wanted(pattern)) for part in scores().split(width, dim=1)]
    assert pattern.verify(torch.cat(parts, dim=1))


@pytest.mark.parametrize("text", TEXTS)
def test_its_own_storage_is_legal_and_exact(text):
    pattern = parse(text)
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * pattern.select(scores(), wanted(pattern))
    hint = pattern.storage(*SHAPE)
    if hint is not None:
        assert torch.equal(unpack(pack(w, hint[0], **hint[1])), w)
    packed = pack_smallest(w, pattern)
    assert torch.equal(unpack(packed), w)
    assert hint is None or packed.nbytes <= pack(w, hint[0], **hint[1]).nbytes


@pytest.mark.parametrize("seed", range(5))
def test_n_of_m_keeps_the_n_best_of_each_group(seed):
    s = scores(seed)
    mask = parse("2:4").select(s, 0.5)
    best = s.view(64, 24, 4).argsort(-1, descending=True)[..., :2]
    expected = torch.zeros(64, 24, 4, dtype=torch.bool).scatter_(-1, best, True)
    assert torch.equal(mask, expected.view(64, 96))


def test_scopes():
    s = scores() + torch.arange(64)[:, None]
    assert (parse("unstructured:row").select(s, 0.5).sum(1) == 48).all()
    assert parse("unstructured:layer").select(s, 0.5)[32:].all()
    assert parse("unstructured").text == "unstructured:layer"
    assert parse("unstructured", default_scope="row").text == "unstructured:row"
    assert (parse("4x8:row").select(s, 0.5).sum(1) == 48).all()


def test_rows_columns_and_channels_go_by_their_sum():
    s = torch.ones(4, 6)
    s[1] = 3
    s[:, 2:4] += 1
    assert parse("row").select(s, 0.25).nonzero()[:, 0].unique().tolist() == [1]
    assert parse("column").select(s, 1 / 3).nonzero()[:, 1].unique().tolist() == [2, 3]
    assert parse("channel").fit(2).select(s, 1 / 3).nonzero()[:, 1].unique().tolist() == [2, 3]
    assert parse("channel").fit(2).group_columns is None
    assert parse("2:4").fit(9) == parse("2:4")


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        ("2:4", (8, 30), "4 does not divide the width 30"),
        ("16x32", (8, 32), "16 does not divide the height 8"),
        ("16x32", (16, 30), "32 does not divide the width 30"),
        ("column:4", (8, 30), "4 does not divide the width 30"),
    ],
)
def test_shapes_that_do_not_fit_name_the_layer_and_the_remedy(text, shape, reason):
    pattern = parse(text)
    with pytest.raises(PumiceError, match=reason) as caught:
        pattern.check_shape("model.layers.0.fc", *shape, wanted(pattern))
    assert "model.layers.0.fc" in str(caught.value)
    assert "ignore" in str(caught.value)


@pytest.mark.parametrize("text", ["3:2", "0:4", "0x4", "column:0", "unstructured:model", "diagonal", "2-4", ""])
def test_bad_texts_are_refused(text):
    with pytest.raises(PumiceError, match="pattern="):
        parse(text)


def test_unknown_pattern_lists_the_grammar():
    with pytest.raises(PumiceError, match=r"unstructured\[:row\|layer\|global\]"):
        parse("diagonal")
    with pytest.raises(PumiceError, match="scope='model'"):
        parse("unstructured", default_scope="model")


def test_densities():
    assert parse("2:4").density(None) == 0.5
    assert parse("2:4").density(0.5) == 0.5
    with pytest.raises(PumiceError, match="contradicts"):
        parse("2:4").density(0.7)
    for bad in (0, 1.5, -1, True):
        with pytest.raises(PumiceError, match="outside"):
            parse("unstructured").density(bad)
    with pytest.raises(PumiceError, match="needs a density"):
        parse("row").density(None)
    assert select.keep_count(10, 0.7) == 7
