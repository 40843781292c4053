"""The sites' names, each made when asked for: a million of them cost nothing."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np

from koinon.data.dataset import Array

LATELY = 1 << 13
"""Positions that are remembered: a round asks for those of its sites several times."""


@dataclass(frozen=True, eq=False)
class Names(Sequence[str]):
    """'site-1' .. 'site-N'; or a natural id's different values, as text.

    >>> names = Names(1_000_000)
    >>> names[999_999], names.index("site-3"), "site-0" in names, names[:2]
    ('site-1000000', 2, False, ['site-1', 'site-2'])
    >>> Names(2, np.array([30, 4])).index("4")
    1
    """

    size: int
    values: Array | None = None

    def __post_init__(self) -> None:
        vars(self)["_lately"] = {}
        if self.values is not None and self.values.dtype.kind not in "iuU":  # whose text does not say which they were
            vars(self).update(values=np.array([str(value) for value in self.values]))

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, which: int) -> str: ...
    @overload
    def __getitem__(self, which: slice) -> list[str]: ...
    def __getitem__(self, which: int | slice) -> str | list[str]:
        if isinstance(which, slice):
            return [self[number] for number in range(self.size)[which]]
        number = range(self.size)[which]
        name = f"site-{number + 1}" if self.values is None else str(self.values[number])
        lately: dict[str, int] = vars(self)["_lately"]
        if len(lately) == LATELY:
            lately.clear()
        lately[name] = number
        return name

    def __contains__(self, name: object) -> bool:
        with contextlib.suppress(ValueError):
            return self.index(str(name)) >= 0
        return False

    def index(self, name: str, start: int = 0, stop: int | None = None) -> int:
        """The position of a name."""
        number: int = vars(self)["_lately"].get(name, -1)
        if number < 0 and self.values is None:
            number = _number(name)
        elif number < 0:
            read, ordered, places = self._ordered
            with contextlib.suppress(ValueError):
                nearest = bisect_left(ordered, read(name))
                number = places[nearest] if nearest < self.size and str(ordered[nearest]) == name else -1
        if not 0 <= number < self.size or ((start, stop) != (0, None) and number not in range(self.size)[start:stop]):
            raise ValueError(f"'{name}' is not one of '{self[0]}' .. '{self[-1]}'")
        return number

    @cached_property
    def _ordered(self) -> tuple[Callable[[str], Any], Any, Any]:
        """What a name is compared as, the values in order, and where each stands; numbers as Python reads them best."""
        assert self.values is not None
        places = np.argsort(self.values)
        ordered, kind = self.values[places], self.values.dtype.kind
        if kind == "U":
            return str, ordered, places.data
        return int, ordered.astype("i8" if kind == "i" else "u8").data, places.data


def _number(name: str) -> int:
    """Which site of all without values this is, from 0; -1 if none: only one text is a name, 'site-01' is nobody's."""
    try:
        number = int(name.removeprefix("site-")) - 1
    except ValueError:
        return -1
    return number if name == f"site-{number + 1}" else -1
