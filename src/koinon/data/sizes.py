"""Sizes: how many samples each site holds, as values that a partition takes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from koinon.data.dataset import Array
from koinon.errors import DataError, SettingsError


@dataclass(frozen=True)
class Sizes:
    """How many samples each site holds.

    Args:
        name: canonical text.
        draw: (samples, sites, random) -> int64 [sites], of which the sum is `samples` (or below, if explicit).
        sites: how many sites it names, where it names them.
        smallest: the smallest size, where it is known beforehand.
    """

    name: str
    draw: Callable[[int, int, np.random.Generator], Array]
    sites: int | None = None
    smallest: int | None = None


def equal() -> Sizes:
    """The same number for every site, give or take one."""
    return Sizes("equal()", _equal)


def lognormal(sigma: float = 1.0) -> Sizes:
    """Sizes in proportion to exp(sigma * z), z standard normal.

    >>> lognormal().name
    'lognormal(1.0)'
    """
    if not 0 <= sigma < math.inf:
        raise SettingsError(f"lognormal: sigma must be a finite number, 0 or more, not {sigma}")
    return Sizes(f"lognormal({float(sigma)})", partial(_lognormal, float(sigma)))


def power_law(exponent: float = 1.5) -> Sizes:
    """Sizes in proportion to rank ** -exponent, ranks dealt to the sites at random (Zipf)."""
    if not 0 <= exponent < math.inf:
        raise SettingsError(f"power_law: the exponent must be a finite number, 0 or more, not {exponent}")
    return Sizes(f"power_law({float(exponent)})", partial(_power_law, float(exponent)))


def explicit(counts: Sequence[int]) -> Sizes:
    """Exactly these sizes; samples beyond their sum belong to nobody.

    >>> explicit([30, 10]).name
    'explicit([30, 10])'
    """
    sizes = np.asarray(counts)
    if sizes.ndim != 1 or not len(sizes) or sizes.dtype.kind not in "iu" or int(sizes.min()) < 0:
        raise SettingsError(f"explicit: sizes are a list of whole numbers, 0 or more, not {counts!r}")
    sizes = sizes.astype(np.int64)
    text = str(sizes.tolist())
    if len(sizes) > 20:  # the name goes into every record of a run
        text = f"{len(sizes)} sizes, sum {sizes.sum()}, {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return Sizes(f"explicit({text})", partial(_explicit, sizes), len(sizes), int(sizes.min()))


def proportional(logs: Array, total: int) -> Array:
    """Whole numbers that sum to `total`, in proportion to exp(logs): the rounded cumulative shares' differences.

    >>> proportional(np.log([1.0, 1.0, 2.0]), 8).tolist()
    [2, 2, 4]
    """
    edges = np.cumsum(np.exp(logs - logs.max()))
    cuts = np.rint(edges / edges[-1] * total).astype(np.int64)
    return np.diff(cuts, prepend=0)


def levelled(counts: Array, at_least: int) -> Array:
    """The counts with none below `at_least`, the difference taken from the largest, levelled from the top.

    >>> levelled(np.array([0, 9, 7, 2]), 2).tolist()
    [2, 7, 7, 2]
    """
    missing = int(np.maximum(at_least - counts, 0).sum())
    if not missing:
        return counts
    low, high = at_least, int(counts.max())  # the highest level above which there is enough lies in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        enough = int(np.maximum(counts - middle, 0).sum()) >= missing
        low, high = (middle, high) if enough else (low, middle)
    after = np.clip(counts, at_least, max(low, at_least))
    spare = int(counts.sum() - after.sum())  # the last step down takes too much: some keep one more
    after[np.flatnonzero(counts > low)[:spare]] += 1
    return after


def _equal(samples: int, sites: int, random: np.random.Generator) -> Array:
    share, rest = divmod(samples, sites)
    return share + (np.arange(sites) < rest).astype(np.int64)


def _lognormal(sigma: float, samples: int, sites: int, random: np.random.Generator) -> Array:
    return proportional(sigma * random.standard_normal(sites), samples)


def _power_law(exponent: float, samples: int, sites: int, random: np.random.Generator) -> Array:
    return proportional(-exponent * np.log(1.0 + random.permutation(sites)), samples)


def _explicit(sizes: Array, samples: int, sites: int, random: np.random.Generator) -> Array:
    if len(sizes) != sites:
        raise DataError(f"explicit names {len(sizes)} sizes, the split has {sites} sites: leave out sites=, or agree")
    if sizes.sum() > samples:
        raise DataError(f"explicit sizes sum to {sizes.sum()}; there are {samples} samples")
    return sizes.copy()
