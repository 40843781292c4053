"""The pieces in which a task's sites are worked off."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.task.answers import COHORTS, LARGEST, chunks

SIZES = st.lists(st.integers(1, 10_000), min_size=1, max_size=300)


def cut(sizes, cohort):
    """The sizes of each piece's sites."""
    return [[sizes[site] for site in piece] for piece in chunks(range(len(sizes)), np.array(sizes), cohort)]


@given(SIZES, st.sampled_from([1, 2, 32]))
def test_every_site_stands_in_one_piece_the_largest_first(sizes, cohort):
    """None is lost or asked twice, and no piece holds more sites than its kind may."""
    pieces = cut(sizes, cohort)
    assert [size for piece in pieces for size in piece] == sorted(sizes, reverse=True)
    assert max(map(len, pieces)) <= (LARGEST if cohort == 1 else COHORTS * cohort)


@pytest.mark.parametrize(("cohort", "first"), [(1, [8000]), (32, [8000, 4000, 2667, 2000])])
def test_who_holds_most_is_joined_where_steps_are_shared(cohort, first):
    """Sizes by Zipf's law: alone where sites are trained one after the other, else beside as much again."""
    assert cut([8000 // rank for rank in range(1, 1001)], cohort)[0] == pytest.approx(first, abs=1)


def test_equal_sites_make_equal_pieces():
    """A thousand of them, in cohorts of 32: every worker is done at about the same time."""
    lengths = [len(piece) for piece in cut([20] * 1000, 32)]
    assert len(lengths) == 16
    assert set(lengths[:-1]) == {63}
