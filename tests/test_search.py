"""The knee of quality against density: found by real measurements, resumable, refused where it makes no sense."""

import json

import pytest

from pumice.analyze import knee
from pumice.core.errors import PumiceError
from tests import tiny
from tests.test_cli import call, found, refused


def curve(density):
    """Perplexity 10 down to density 0.437, then it climbs."""
    return 10 + max(0.0, 0.437 - density) * 50


def search(**changes):
    return knee.Search(**{"measure": "perplexity", "lower_is_better": True, "dense": 10.0, "tolerance": 0.01} | changes)


@pytest.mark.parametrize("resolution", [0.05, 0.01, 0.002])
def test_bisection_finds_the_knee_to_the_resolution(resolution):
    asked = []

    def prune(density):
        asked.append(density)
        return density, curve(density)

    done = knee.find_knee(search(), prune, resolution=resolution)
    edge = 0.437 - 0.1 / 50
    assert done.beyond < edge <= done.knee
    assert done.knee - done.beyond <= resolution * 1.001
    assert len(asked) == len(set(asked)) == len(done.points)
    assert len(asked) <= len(knee.DENSITIES) + 7


def test_the_sweep_alone_stops_at_the_first_that_is_not_good_enough():
    steps = list(knee.sweep([0.5, 0.9, 0.2, 0.4], curve, lambda quality: quality <= 10.1))
    assert [(density, accepted) for density, _, accepted in steps] == [(0.9, True), (0.5, True), (0.4, False)]
    short = knee.find_knee(search(), lambda d: (d, curve(d)), whole=False, resolution=0.1)
    assert {point.asked for point in short.points} == {0.9, 0.8, 0.7, 0.6, 0.5, 0.4}


def test_a_measure_of_which_more_is_better():
    done = knee.find_knee(
        search(measure="accuracy", lower_is_better=False, dense=0.8), lambda d: (d, 0.8 if d >= 0.55 else 0.6)
    )
    assert 0.55 <= done.knee <= 0.56
    assert done.loss(0.6) == pytest.approx(0.25)


def test_only_what_is_missing_is_measured_again():
    first = knee.find_knee(search(), lambda d: (d, curve(d)))
    again = knee.Search.from_dict(json.loads(json.dumps(first.to_dict())))

    def prune(density):
        raise AssertionError(density)

    assert knee.find_knee(again, prune) == first


def test_all_or_nothing_is_said():
    free = knee.find_knee(search(), lambda d: (d, 9.9))
    assert (free.knee, free.beyond) == (0.3, None)
    assert "try lower" in knee.verdict(free)
    none = knee.find_knee(search(), lambda d: (d, 20.0), resolution=0.02)
    assert none.knee is None
    assert none.beyond > 0.98
    assert "No density" in knee.verdict(none)


@pytest.mark.parametrize(
    ("options", "said"), [({"densities": (0.5, 1.5)}, "densities"), ({"resolution": 0.0}, "resolution")]
)
def test_bad_ladders_are_refused(options, said):
    with pytest.raises(PumiceError, match=said):
        knee.find_knee(search(), lambda d: (d, 1.0), **options)


def test_the_picture_marks_the_knee(tmp_path):
    pytest.importorskip("matplotlib")
    done = knee.find_knee(search(settings={"method": "a<b", "model": "m"}), lambda d: (d, curve(d)))
    axes = knee.figure(done).axes[0]
    assert any(list(line.get_xdata()) == [done.knee, done.knee] for line in axes.lines)
    files = knee.write(done, tmp_path)
    assert [file.name for file in files] == ["search.json", "knee.png", "search.html"]
    assert (tmp_path / "knee.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "search.html").read_text()
    assert "a&lt;b" in page
    assert f"density {done.knee:.4g}" in page
    assert "http" not in page.replace("http://www.w3.org", "")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(tiny.words(1500))
    return folder


def arguments(place, out, *more):
    text = place / "text.txt"
    return ("search", place / "model", "-o", out, "--densities", "0.9,0.5", "--eval-data", text, "--eval-seqlen", "16",
            "--max-windows", "8", "--resolution", "0.2", *more)  # fmt: skip


def test_the_command_prunes_measures_and_goes_on(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = found(*arguments(place, out))
    assert {0.9, 0.5} <= {point["asked"] for point in first["points"]}
    assert json.loads((out / "search.json").read_text())["points"] == first["points"]
    for point in first["points"]:
        assert point["density"] == pytest.approx(point["asked"], abs=0.02)
    assert "exists" in refused(*arguments(place, out))
    monkeypatch.setattr("pumice.engine.prune.prune", lambda *a, **k: pytest.fail("measured twice"))
    assert found(*arguments(place, out, "--resume")) == first
    assert "had tolerance=0.01" in refused(*arguments(place, out, "--resume", "--tolerance", "0.5"))


def test_the_dense_quality_is_the_models(place, tmp_path):
    dense = found("eval", place / "model", "--data", place / "text.txt", "--seqlen", "16", "--max-windows", "8")
    state = found(*arguments(place, tmp_path / "out", "--tolerance", "1000"))
    assert state["dense"] == pytest.approx(dense["perplexity"])
    assert state["knee"] == 0.5


@pytest.mark.parametrize(
    ("more", "said"),
    [(("--density", "0.5"), "--densities"), (("--pattern", "2:4"), "contradicts"), (("--method", "wandaa"), "did you mean"),
     (("--densities", "half"), "densities=")],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused_at_once(place, tmp_path, more, said):
    assert said in refused(*arguments(place, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_left_alone(place, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    assert "exists" in refused(*arguments(place, tmp_path, "--overwrite"))
    assert (tmp_path / "mine.txt").read_text() == "keep"
    assert call("search", "--help").exit_code == 0
