"""A dataset is named columns of equal length, stored compactly and read as numbers."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

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
