"""The order in which samples are visited."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.errors import SettingsError
from koinon.training.batches import batches, check

NUMBERS = st.integers(1, 40)


def drawn(samples, size, **settings):
    return list(batches(samples, size, random=np.random.default_rng(0), **settings))


@given(NUMBERS, NUMBERS, st.integers(1, 3), st.integers(1, 3))
def test_each_epoch_visits_every_sample_once(samples, size, epochs, tail):
    """No sample is dropped, none comes twice, whatever the last batch."""
    visited = np.concatenate(drawn(samples, size, epochs=epochs, tail=tail))
    for epoch in visited.reshape(epochs, samples):
        assert sorted(epoch) == list(range(samples))


@given(NUMBERS, NUMBERS, NUMBERS)
def test_steps_are_counted_not_epochs(samples, size, steps):
    """A site with few samples goes round them as often as needed."""
    assert len(drawn(samples, size, steps=steps, epochs=99)) == steps


def test_a_small_last_batch_joins_the_one_before():
    """A batch norm cannot take a batch of one sample; a site of one sample has no choice."""
    assert [len(batch) for batch in drawn(9, 4, tail=2)] == [4, 5]
    assert [len(batch) for batch in drawn(1, 4, tail=2)] == [1]


@pytest.mark.parametrize(
    ("setting", "value"), [("lr", 0), ("lr", -0.1), ("epochs", 0), ("batch_size", 0), ("steps", 0)]
)
def test_settings_outside_their_domain_are_refused_by_name(setting, value):
    """Before anything runs."""
    settings = {"lr": 0.1, "epochs": 1, "batch_size": 1, "steps": None, setting: value}
    with pytest.raises(SettingsError, match=setting):
        check(**settings)
