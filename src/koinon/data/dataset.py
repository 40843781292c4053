"""A dataset: named columns of equal length, stored compactly and read as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

    A part of a dataset (`take`) shares the stored columns with the whole and knows its `rows` of them: samples are
    gathered when a column is first read, so that whoever needs them elsewhere gathers `stored[name][rows]` itself.

    Args:
        stored: column name -> array [samples, ...].
        scale: column name -> (a, b).
        classes: what the integers in `y` stand for, by position, where they have names.
        rows: the positions that belong to this dataset, int [n]; None: all.

    Raises:
        DataError: the columns are not of equal length, or hold Python objects.

    >>> data = Dataset({"x": np.array([[0], [255]], np.uint8), "y": np.array([0, 1])}, scale={"x": (1 / 127.5, -1.0)})
    >>> len(data), data.columns, data.x.tolist(), data.raw("x").tolist()
    (2, ('x', 'y'), [[-1.0], [1.0]], [[0], [255]])
    """

    stored: Mapping[str, Array]
    scale: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    rows: Array | None = None

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
        vars(self).update(stored=arrays, _gathered={})

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns' names."""
        return tuple(self.stored)

    def __len__(self) -> int:
        return len(next(iter(self.stored.values())) if self.rows is None else self.rows)

    def __reduce__(self) -> tuple[Any, ...]:  # a part travels without the whole
        return Dataset, (self.whole(), self.scale, self.classes)

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __repr__(self) -> str:
        columns = ", ".join(f"{name} {array.dtype}{list(array.shape[1:])}" for name, array in self.stored.items())
        return f"Dataset({len(self)} samples: {columns})"

    def raw(self, name: str) -> Array:
        """A column as it is stored.  Neighbours are a view, read-only; other parts are gathered once and kept."""
        if name not in self.stored:
            raise DataError(f"there is no column '{name}': {nearest(str(name), self.stored)}")
        if self.rows is None:
            return self.stored[name]
        gathered: dict[str, Array] = vars(self)["_gathered"]
        if name not in gathered:
            whole, rows = self.stored[name], self.rows
            first, last = (int(rows[0]), int(rows[-1])) if len(rows) else (0, -1)
            # Ends as far apart as neighbours' would be are rare enough among others that looking closer costs nothing.
            near = first + len(rows) == last + 1 and bool((rows[1:] - rows[:-1] == 1).all())
            gathered[name] = whole[first : last + 1] if near else whole.take(rows, axis=0)
            gathered[name].flags.writeable = not near
        return gathered[name]

    def whole(self) -> dict[str, Array]:
        """All columns as they are stored, gathered."""
        return {name: self.raw(name) for name in self.stored}

    def __getitem__(self, name: str) -> Array:
        raw = self.raw(name)
        if name not in self.scale:
            if self.rows is not None and not raw.flags.writeable:  # what is read is the reader's own
                raw = vars(self)["_gathered"][name] = raw.copy()
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
        """Some of the samples: a slice of the whole shares memory, other parts are gathered when they are read.

        Raises:
            IndexError: there is no such sample.
        """
        count = len(self)
        if isinstance(which, slice):
            if self.rows is None:
                return Dataset({name: array[which] for name, array in self.stored.items()}, self.scale, self.classes)
            return self.part(np.arange(count)[which])
        index = np.asarray(which, dtype=np.intp)
        if index.size and not -count <= index.min() <= index.max() < count:
            raise IndexError(f"there are {count} samples: positions {index.min()}..{index.max()} cannot be taken")
        return self.part(index + count * (index < 0))

    def part(self, index: Array) -> Dataset:
        """`take` of positions known to be good, int [n] in 0..len - 1."""
        rows = index if self.rows is None else self.rows[index]
        part = object.__new__(Dataset)  # what was checked once is not checked at every site and round
        vars(part).update(stored=self.stored, scale=self.scale, classes=self.classes, rows=rows, _gathered={})
        return part


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
        Dataset({**data.whole(), "y": part.astype(np.int64)}, data.scale, tuple(str(name) for name in names))
        for data, part in zip(both, (codes[:cut], codes[cut:]), strict=False)
    ]
    return named[0], named[1] if len(named) == 2 else test
