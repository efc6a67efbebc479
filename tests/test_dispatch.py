"""Dispatch: the best backend that does not refuse, and a reason for every refusal."""

import pytest
import torch

from pumice.core import dispatch
from pumice.core.dispatch import Backend, Call
from pumice.core.errors import PumiceError

BF16 = torch.bfloat16


def call(rows: int = 1, dtype: torch.dtype = BF16, device: str = "cpu", layout: str = "bitmask") -> Call:
    return Call("linear", layout, dtype, device, rows, (8, 8))


def backend(name: str, priority: int, reason: str | None = None, layout: str = "bitmask") -> Backend:
    def refuse(_call: Call) -> str | None:
        return reason

    def prepare(_packed: object, _bias: object) -> dispatch.Run:
        return lambda x: x

    return Backend(name, "linear", layout, refuse, prepare, priority)


@pytest.fixture
def empty(monkeypatch):
    """A dispatch that knows nobody and discovers nothing."""
    monkeypatch.setattr(dispatch, "_backends", {})
    monkeypatch.setattr(dispatch, "_traced", {})
    monkeypatch.setattr(dispatch, "_discovered", True)


@pytest.mark.usefixtures("empty")
def test_best_that_does_not_refuse_is_chosen_and_refusals_are_listed_in_order():
    slow, fast, best = backend("slow", 0), backend("fast", 5), backend("best", 9, "needs a better CPU")
    for one in (slow, best, fast, backend("other", 99, layout="csr")):
        dispatch.register(one)
    assert dispatch.candidates(call()) == [(best, "needs a better CPU"), (fast, None), (slow, None)]
    assert dispatch.choose(call()) is fast


@pytest.mark.usefixtures("empty")
def test_all_refusing_gives_every_reason():
    dispatch.register(backend("a", 1, "too many rows"))
    dispatch.register(backend("b", 2, "no GPU"))
    with pytest.raises(PumiceError, match=r"b: no GPU; a: too many rows.*unpack the layer"):
        dispatch.choose(call())
    with pytest.raises(PumiceError, match="none is registered"):
        dispatch.choose(call(layout="dense"))


@pytest.mark.usefixtures("empty")
def test_two_modules_cannot_take_one_name():
    dispatch.register(backend("a", 1))
    dispatch.register(backend("a", 2))
    stranger = backend("a", 3)
    stranger.prepare.__module__ = "elsewhere"
    with pytest.raises(PumiceError, match="'a' of linear/bitmask is registered twice"):
        dispatch.register(stranger)


@pytest.mark.usefixtures("empty")
def test_unknown_names_list_the_known():
    dispatch.register(backend("decode", 1))
    with pytest.raises(PumiceError, match="unknown backend 'warp' of linear/bitmask: known are decode"):
        dispatch.get("linear", "bitmask", "warp")
    with pytest.raises(PumiceError, match="op='linear' has no traced form"):
        dispatch.traced("linear", None, None, torch.zeros(1, 1))  # type: ignore[arg-type]


def test_limits_say_what_is_wrong_in_words():
    assert dispatch.limits(call(), devices=("cpu",), dtypes=(BF16,), max_rows=1) is None
    assert dispatch.limits(call(rows=64), max_rows=16, instead="panel") == "rows 64 > 16: use panel"
    assert dispatch.limits(call(dtype=torch.float16), dtypes=(BF16,)) == (
        "dtype float16 not supported by this kernel (bfloat16 only)"
    )
    assert "device cuda:1" in (dispatch.limits(call(device="cuda:1"), devices=("cpu",)) or "")


def test_a_kernel_file_that_does_not_import_is_fatal_and_named(tmp_path, monkeypatch):
    package = tmp_path / "broken_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "bad.py").write_text("raise RuntimeError('boom')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dispatch, "KERNELS", "broken_kernels")
    monkeypatch.setattr(dispatch, "_discovered", False)
    with pytest.raises(PumiceError, match=r"broken_kernels/bad\.py does not import: RuntimeError: boom"):
        dispatch.discover()


@pytest.mark.parametrize("layout", ["dense", "bitmask", "nm", "block", "csr"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_layout_runs_in_every_dtype_and_refusals_are_sentences(layout, dtype):
    for rows in (1, 16, 1000):
        one = Call("linear", layout, dtype, "cpu", rows, (64, 64))
        assert dispatch.choose(one).layout == layout
        for _, reason in dispatch.candidates(one):
            assert reason is None or len(reason) > 10
