"""A dataset is named columns of equal length, stored compactly and read as numbers."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.data import Dataset
from koinon.data.images import SCALE
from koinon.errors import DataError

DATA = Dataset({"x": np.arange(256, dtype=np.uint8)[:, None], "y": np.arange(256)}, scale={"x": SCALE})


def test_a_column_reads_as_item_and_as_attribute():
    """`data["y"]` and `data.y` are the stored array; the length is the number of samples."""
    assert DATA["y"] is DATA.y
    assert (len(DATA), DATA.columns, "x" in DATA, "z" in DATA) == (256, ("x", "y"), True, False)


def test_a_scaled_column_reads_as_float32_within_its_bounds():
    """x / 127.5 - 1 lies in [-1, 1] for every byte, and the bytes stay as they are."""
    assert DATA.x.dtype == np.float32
    assert (DATA.x.min(), DATA.x.max()) == (-1.0, 1.0)
    np.testing.assert_allclose(DATA.x[:, 0], np.arange(256) / 127.5 - 1, atol=2e-7)
    assert DATA.raw("x").dtype == np.uint8


def test_taking_keeps_columns_together():
    """A slice and indices take the same samples of every column; a slice shares memory."""
    for part in (DATA.take(slice(2, 5)), DATA.take([2, 3, 4])):
        assert part.y.tolist() == part.raw("x")[:, 0].tolist() == [2, 3, 4]
        np.testing.assert_array_equal(part.x, DATA.x[2:5])
    assert np.shares_memory(DATA.take(slice(2, 5)).y, DATA.y)
    assert len(DATA.take([])) == 0


POSITIONS = st.lists(st.integers(-3, 2), max_size=9) | st.slices(3) | st.just([0, 1, 2]) | st.just([1, 2])


@given(POSITIONS, POSITIONS)
def test_parts_of_parts_are_numpys(first, second):
    """Positions, negative ones, neighbours and slices, one upon the other."""
    whole, y = Dataset({"x": np.arange(10), "y": np.arange(10)}).take(range(4, 7)), np.arange(4, 7)
    part, y = whole.take(first), y[first]
    assert (len(part), part.raw("y").tolist(), part.y.tolist()) == (len(y), y.tolist(), y.tolist())
    if all(-len(y) <= place < len(y) for place in second) if isinstance(second, list) else True:
        assert part.take(second).y.tolist() == y[second].tolist()
    else:
        with pytest.raises(IndexError, match=f"there are {len(y)} samples"):
            part.take(second)


def test_a_part_shares_columns_until_it_is_read():
    """Neighbours are a view, read-only, for whoever asks for raw values; what is read is the reader's own."""
    whole = Dataset({"x": np.arange(6.0)})
    near, far = whole.take([1, 2, 3]), whole.take([3, 1])
    assert near.stored["x"] is far.stored["x"] is whole.x
    assert (near.rows.tolist(), far.rows.tolist()) == ([1, 2, 3], [3, 1])
    assert np.shares_memory(near.raw("x"), whole.x)
    with pytest.raises(ValueError, match="read-only"):
        near.raw("x")[0] = 9
    for part in (near, far):
        part.x[0] = 9
        assert part.x[0] == 9
        assert part.x is part.x
    assert whole.x.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_part_travels_without_the_whole():
    """As few bytes as it has samples."""
    part = Dataset({"x": np.arange(100_000), "y": np.arange(100_000)}).take([5, 3])
    packed = pickle.dumps(part)
    assert len(packed) < 1000
    assert (pickle.loads(packed).y.tolist(), copy.deepcopy(part).y.tolist()) == ([5, 3], [5, 3])


@pytest.mark.parametrize("other", [copy.deepcopy(DATA), pickle.loads(pickle.dumps(DATA))], ids=["copied", "pickled"])
def test_a_copy_is_the_same_dataset(other: Dataset):
    """Copying and pickling do not go astray in attribute access."""
    np.testing.assert_array_equal(other.x, DATA.x)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"x": np.zeros((3, 2)), "y": np.zeros(2)}, "'x' has 3, 'y' has 2"),
        ({}, "there are none"),
        ({"x": np.array([{}, []], dtype=object)}, "column 'x' holds Python objects"),
        ({"x": 3.0}, "column 'x' is one value"),
    ],
)
def test_what_is_no_dataset_is_refused(columns: dict, says: str):
    """The message names the columns."""
    with pytest.raises(DataError, match=says):
        Dataset(columns)


def test_an_unknown_column_is_named_with_the_nearest():
    """By item a DataError, by attribute an AttributeError, as Python's own protocols need it."""
    long = Dataset({"hospital": np.zeros(1)})
    with pytest.raises(DataError, match="did you mean 'hospital'"):
        long["hospitl"]
    with pytest.raises(AttributeError, match="hospitl"):
        _ = long.hospitl
    with pytest.raises(DataError, match="scale names no column"):
        Dataset({"x": np.zeros(1)}, scale={"z": SCALE})
