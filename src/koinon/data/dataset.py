"""A dataset: named columns of equal length, stored compactly and read as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from koinon.errors import DataError, nearest

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Samples as named columns, customarily `x` (features) and `y` (target).

    A column named `c` reads as `data["c"]` or `data.c`; `len(data)` is the number of samples.  A column in
    `scale` is stored as it is and reads as float32: raw * a + b, computed anew at each reading.

    Args:
        stored: column name -> array [samples, ...].
        scale: column name -> (a, b).
        classes: what the integers in `y` stand for, by position, where they have names.

    Raises:
        DataError: the columns are not of equal length, or hold Python objects.

    >>> data = Dataset({"x": np.array([[0], [255]], np.uint8), "y": np.array([0, 1])}, scale={"x": (1 / 127.5, -1.0)})
    >>> len(data), data.columns, data.x.tolist(), data.raw("x").tolist()
    (2, ('x', 'y'), [[-1.0], [1.0]], [[0], [255]])
    """

    stored: Mapping[str, Array]
    scale: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        arrays = {str(name): np.asarray(column) for name, column in self.stored.items()}
        for name, array in arrays.items():
            if array.ndim == 0:
                raise DataError(f"column '{name}' is one value, not a column: give an array [samples, ...]")
            if array.dtype.hasobject:
                raise DataError(f"column '{name}' holds Python objects: give numbers or text of one type")
        if len({len(array) for array in arrays.values()}) != 1:
            lengths = ", ".join(f"'{name}' has {len(array)}" for name, array in arrays.items())
            raise DataError(f"columns must be of equal length: {lengths or 'there are none'}")
        if unknown := set(self.scale) - set(arrays):
            raise DataError(f"scale names no column '{min(unknown)}': {nearest(min(unknown), arrays)}")
        object.__setattr__(self, "stored", arrays)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns' names."""
        return tuple(self.stored)

    def __len__(self) -> int:
        return len(next(iter(self.stored.values())))

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __repr__(self) -> str:
        columns = ", ".join(f"{name} {array.dtype}{list(array.shape[1:])}" for name, array in self.stored.items())
        return f"Dataset({len(self)} samples: {columns})"

    def raw(self, name: str) -> Array:
        """A column as it is stored."""
        if name not in self.stored:
            raise DataError(f"there is no column '{name}': {nearest(str(name), self.stored)}")
        return self.stored[name]

    def __getitem__(self, name: str) -> Array:
        raw = self.raw(name)
        if name not in self.scale:
            return raw
        factor, shift = self.scale[name]
        read = raw.astype(np.float32)
        read *= np.float32(factor)
        read += np.float32(shift)
        return read

    def __getattr__(self, name: str) -> Array:
        # Only reached where no attribute exists; underscored names belong to Python's own protocols (copy, pickle).
        if name.startswith("_") or name not in self.stored:
            raise AttributeError(f"a Dataset has no attribute or column '{name}'")
        return self[name]

    def take(self, which: Array | Sequence[int] | slice) -> Dataset:
        """Some of the samples: a slice shares memory, indices copy."""
        index = which if isinstance(which, slice) else np.asarray(which, dtype=np.intp)
        return replace(self, stored={name: array[index] for name, array in self.stored.items()})


def dataset(columns: Any, y: Any = None) -> Dataset:
    """A Dataset from what people have: a Dataset, a mapping of columns, a pair (x, y), or x and y."""
    if isinstance(columns, Dataset):
        return columns
    if isinstance(columns, Mapping):
        return Dataset(columns)
    if y is None and isinstance(columns, tuple) and len(columns) == 2:
        columns, y = columns
    return Dataset({"x": columns} if y is None else {"x": columns, "y": y})


def with_classes(train: Dataset, test: Dataset | None) -> tuple[Dataset, Dataset | None]:
    """Both sets with a target of text replaced by int64 positions among the sorted names of both."""
    both = [data for data in (train, test) if data is not None and "y" in data]
    if not both or both[0].y.dtype.kind not in "US":
        return train, test
    names, codes = np.unique(np.concatenate([data.y.astype(np.str_) for data in both]), return_inverse=True)
    cut = len(both[0])
    named = [
        replace(data, stored={**data.stored, "y": part.astype(np.int64)}, classes=tuple(str(name) for name in names))
        for data, part in zip(both, (codes[:cut], codes[cut:]), strict=False)
    ]
    return named[0], named[1] if len(named) == 2 else test
