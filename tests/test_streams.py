"""Random streams as functions of their key: known numbers, and no key like another."""

import itertools

import numpy as np
import pytest

from koinon.streams import number, stream

KEYS = list(itertools.product([0, 1], ["batches", "torch"], [0, 1], [0, "0", "site-1"]))


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_equal_keys_give_equal_numbers(key):
    """However often, and whatever was drawn from elsewhere in between."""
    first = stream(*key).random(5)
    np.random.random()
    assert stream(*key).random(5).tolist() == first.tolist()
    assert number(*key) == number(*key)


def test_different_keys_give_different_numbers():
    """Seed, purpose, round and site all count; a site's number is not its name."""
    assert len({stream(*key).random() for key in KEYS}) == len(KEYS)
    assert len({number(*key) for key in KEYS}) == len(KEYS)


@pytest.mark.parametrize(
    ("key", "integer", "drawn"),
    [
        ((0, "batches"), 3933440728840216528, [0.05814586291501023, 0.1935888673580557]),
        ((42, "batches", 3, "site-1"), 3687506286413021979, [0.09562632169295648, 0.27434790507730544]),
        ((7, "partition", 0, 5), 2582808869831421836, [0.22861190301071888, 0.5571591334658664]),
    ],
    ids=str,
)
def test_the_numbers_are_these(key, integer, drawn):
    """Pinned: whoever changes them changes every run that was ever recorded."""
    assert number(*key) == integer
    assert stream(*key).random(len(drawn)).tolist() == drawn


def test_an_integer_has_63_bits():
    """Any library takes it as a seed: it is never negative and fits a signed number of 64 bits."""
    drawn = [number(seed, "bits") for seed in range(100)]
    assert min(drawn) >= 0
    assert max(drawn).bit_length() == 63


def test_a_stream_is_even():
    """The mean of numbers from ten thousand streams, one each, is that of the uniform distribution."""
    drawn = [stream(0, "even", round).random() for round in range(10_000)]
    assert np.mean(drawn) == pytest.approx(0.5, abs=5 * np.sqrt(1 / 12 / 10_000))
