"""Arithmetic over named arrays.  Names, order and dtypes are kept; nothing is written in place."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable

import numpy as np

from koinon.payload.payload import Arrays


def map(function: Callable[[np.ndarray], np.ndarray], arrays: Arrays) -> dict[str, np.ndarray]:
    """Apply a function to every array.

    >>> map(lambda a: a * 2, {"w": np.array([1.0, 2.0])})
    {'w': array([2., 4.])}
    """
    return {name: function(array) for name, array in arrays.items()}


def zip_map(function: Callable[..., np.ndarray], first: Arrays, *others: Arrays) -> dict[str, np.ndarray]:
    """Apply a function of several arrays to those that share a name, in the order of the first.

    Raises:
        KeyError: one of the others lacks a name of the first.

    >>> zip_map(lambda a, b: a + b, {"w": np.array([1.0])}, {"w": np.array([2.0])})
    {'w': array([3.])}
    """
    return {name: function(array, *(other[name] for other in others)) for name, array in first.items()}


def norm(arrays: Arrays) -> float:
    """The Euclidean norm of all entries together, accumulated in float64.

    >>> norm({"a": np.array([3.0]), "b": np.array([4.0])})
    5.0
    """
    return float(np.sqrt(sum(float(np.vdot(a := array.astype(np.float64).ravel(), a)) for array in arrays.values())))


def nbytes(arrays: Arrays) -> int:
    """Bytes of all entries, without names and shapes."""
    return sum(array.nbytes for array in arrays.values())


def finite(arrays: Arrays) -> str | None:
    """The name of the first array with a NaN or an infinity, or None.

    A sum of squares is finite only if its terms are, and one product reads an array faster than any mask; a sum that
    overflows falls back to looking at every entry.
    """
    for name, array in arrays.items():
        if array.dtype.kind not in "fc":
            continue
        total = np.vdot(array, array) if array.itemsize > 2 else math.inf  # (unlike np.dot, it never warns)
        if not cmath.isfinite(total) and not np.isfinite(array).all():
            return name
    return None


def mismatch(arrays: Arrays, like: Arrays) -> str | None:
    """How `arrays` differs from `like` in names, shapes or dtypes, in words; None where it does not.

    >>> mismatch({"w": np.zeros(3)}, {"w": np.zeros(2)})
    "'w' of shape (3,); the global model has (2,)"
    """
    for name, array in arrays.items():
        if name not in like:
            return f"'{name}', which the global model has not"
        if array.shape != like[name].shape:
            return f"'{name}' of shape {array.shape}; the global model has {like[name].shape}"
        if array.dtype != like[name].dtype:
            return f"'{name}' of type {array.dtype}; the global model has {like[name].dtype}"
    if len(arrays) == len(like):
        return None
    return f"no '{next(name for name in like if name not in arrays)}', which the global model has"


def read_only(arrays: Arrays) -> dict[str, np.ndarray]:
    """Views that refuse to be written: what crosses in one process without a copy."""
    views = {name: array.view() for name, array in arrays.items()}
    for view in views.values():
        view.flags.writeable = False
    return views


def floating(arrays: Arrays) -> dict[str, np.ndarray]:
    """The arrays that can be averaged: those of a floating type.  Counters and indices stay as they are."""
    return {name: array for name, array in arrays.items() if array.dtype.kind == "f"}
