"""Arithmetic over named arrays: names, order and types are kept, and nothing is written in place."""

import numpy as np
import pytest

from koinon.payload import tree


def test_map_keeps_names_and_order():
    """The result has the names of the argument, in its order."""
    arrays = {"b": np.ones(2), "a": np.zeros(3)}
    assert list(tree.map(np.negative, arrays)) == ["b", "a"]


def test_zip_map_refuses_a_missing_name():
    """What the first has, the others must have."""
    with pytest.raises(KeyError):
        tree.zip_map(np.add, {"a": np.ones(1)}, {"b": np.ones(1)})


def test_norm_of_half_precision_does_not_overflow():
    """The squares are summed in double precision."""
    assert tree.norm({"w": np.full(4, 300, np.float16)}) == pytest.approx(600)


@pytest.mark.parametrize(
    ("array", "name"),
    [
        (np.array([1.0, 2.0]), None),
        (np.array([1.0, np.nan]), "w"),
        (np.array([np.inf, 1.0]), "w"),
        (np.array([np.inf, -np.inf]), "w"),
        (np.full(4, 3e38, np.float32), None),  # every entry is finite, their sum is not
        (np.array([1, 2]), None),
        (np.array(["a"]), None),
    ],
)
def test_finite_names_the_array_with_a_nan_or_an_infinity(array, name):
    """An overflowing sum of finite entries is not mistaken for an infinity."""
    assert tree.finite({"w": array}) == name


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}, None),
        ({"w": np.zeros((2, 3), np.float32)}, "no 'b', which the global model has"),
        ({"x": np.zeros(1)}, "'x', which the global model has not"),
        ({"w": np.zeros((3, 2), np.float32)}, "'w' of shape (3, 2); the global model has (2, 3)"),
        ({"w": np.zeros((2, 3))}, "'w' of type float64; the global model has float32"),
    ],
)
def test_mismatch_says_what_differs(arrays, words):
    """Names, shapes and types are compared, and the difference is said in words."""
    like = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}
    assert tree.mismatch(arrays, like) == words


def test_read_only_views_refuse_to_be_written_and_copy_nothing():
    """The owner still sees and may write its own array."""
    array = np.zeros(2)
    view = tree.read_only({"w": array})["w"]
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    array[0] = 5
    assert view[0] == 5


def test_floating_leaves_counters_out():
    """Integers and flags cannot be averaged."""
    arrays = {"w": np.zeros(1, np.float16), "count": np.zeros(1, np.int64), "flag": np.zeros(1, bool)}
    assert list(tree.floating(arrays)) == ["w"]


def test_nbytes_counts_entries():
    """Bytes of the entries, of each type's own width."""
    assert tree.nbytes({"a": np.zeros(3, np.float32), "b": np.zeros(2, np.int64)}) == 28
