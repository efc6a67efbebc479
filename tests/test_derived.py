"""What kernels derive from stored tensors is made once, made anew after a change, and gone with its source."""

import gc
import weakref

import torch

from pumice.kernels.derived import derived


class Counted:
    """A maker that remembers how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return torch.full((3,), float(self.calls))


def test_it_is_made_once_for_the_same_tensors():
    sources, make = [torch.zeros(2), torch.zeros(3)], Counted()
    assert derived(sources, make) is derived(sources, make)
    assert make.calls == 1


def test_a_change_in_place_of_any_source_makes_it_anew():
    sources, make = [torch.zeros(2), torch.zeros(3)], Counted()
    derived(sources, make)
    sources[1].add_(1)
    assert derived(sources, make).tolist() == [2.0] * 3
    sources[0].zero_()
    assert derived(sources, make).tolist() == [3.0] * 3


def test_another_second_source_makes_it_anew():
    first, make = torch.zeros(2), Counted()
    derived([first, torch.zeros(3)], make)
    assert derived([first, torch.ones(3)], make).tolist() == [2.0] * 3


def test_inference_tensors_can_be_sources():
    with torch.inference_mode():
        sources = [torch.zeros(2)]
    make = Counted()
    assert derived(sources, make) is derived(sources, make)


def test_it_goes_with_its_first_source():
    first = torch.zeros(2)
    made = weakref.ref(derived([first], Counted()))
    gc.collect()
    assert made() is not None
    del first
    gc.collect()
    assert made() is None
