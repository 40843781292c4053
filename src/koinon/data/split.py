"""A source of data, and its split over sites.  Both are promises: nothing is read before it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

import koinon.data.cache as disk
from koinon.data.dataset import Array, Dataset, dataset, with_classes
from koinon.data.names import Names
from koinon.data.partition import Dealt, Partition, by, grouped
from koinon.errors import DataError, SettingsError, nearest
from koinon.streams import stream

Pair: TypeAlias = tuple[Dataset, Dataset | None]
"""(training set, held-out set or None)."""

Where: TypeAlias = Literal["sites", "server", "both"]

_DEALING = "1"  # raise it when a partition's or the held-out dealing's result changes: old cache entries then lapse
_SITES = 8


@dataclass(frozen=True)
class Source:
    """Where data come from.

    Args:
        name: what a run's record calls it.
        read: () -> (training set, held-out set or None), decoded from scratch.
        key: () -> a digest of everything that `read` depends on, under which the cache keeps what it gave; None if
            that is not worth it.
    """

    name: str
    read: Callable[[], Pair]
    key: Callable[[], str] | None = None

    def load(self, *, cache: bool = True) -> Pair:
        """The training and the held-out set; from the cache, as memory maps, if this content was read before."""
        if not cache or self.key is None:
            return self.read()
        arrays, about = disk.keep("columns", self.key(), lambda: packed(self.read()))
        return unpacked(arrays, about, "train"), unpacked(arrays, about, "test") if "test" in about else None

    def split(
        self,
        partition: Partition,
        sites: int | None = None,
        *,
        seed: int = 0,
        test: Where | None = None,
        cache: bool = True,
    ) -> Split:
        """Deal the samples to sites.

        Args:
            partition: who gets which samples.
            sites: how many; 8 unless the partition says so itself.
            seed: of the dealing, and of nothing else.
            test: who holds the held-out set: every one of the `sites` its share, drawn like its training data; the
                `server` all of it; or `both`.  None: the sites up to 100 of them, the server beyond.
            cache: keep decoded columns and the dealing on disk.

        Raises:
            SettingsError: sites < 1, not what the partition makes, or an unknown `test`.
        """
        if sites is not None and sites < 1:
            raise SettingsError(f"split: there must be 1 site or more, not {sites}")
        if None not in (sites, partition.sites) and sites != partition.sites:
            raise SettingsError(f"split: {partition.name} makes {partition.sites} sites, not {sites}: leave out sites=")
        if test not in (None, "sites", "server", "both"):
            raise SettingsError(f"split: test='{test}': {nearest(str(test), ['sites', 'server', 'both'])}")
        return Split(self, partition, seed, sites, test, cache)


class SiteData(NamedTuple):
    """What one site holds: its training set, and its held-out set if it has one."""

    train: Dataset | None
    test: Dataset | None


@dataclass(frozen=True)
class _Classes:
    """Class codes of both sets; `labels` is None where the target is real-valued or absent."""

    labels: tuple[str, ...] | None
    train: Array
    test: Array | None


@dataclass(frozen=True, eq=False)
class Split:
    """Who holds which samples.  A site is an index range into shared columns, not an object.

    Made by `Source.split` or by `sites`.  The first touch reads the source and deals the samples; both come from the
    cache if they were made before.  It pickles as its settings, without the data.

    Raises:
        DataError: (at first touch) data are missing or corrupt, or cannot be dealt out as asked.
    """

    source: Source
    partition: Partition
    seed: int = 0
    wanted: int | None = None
    test: Where | None = None
    cache: bool = True

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in self.__dataclass_fields__}

    def reduce(self) -> tuple[Any, ...]:
        """How to rebuild it, with what was read and dealt, in another process of this machine (see pickle)."""
        sets = [data and (data.stored, data.scale, data.classes, data.rows) for data in self._sets]
        return _rebuilt, (self.source.name, sets, self._dealt, {**self.__getstate__(), "source": None})

    @property
    def sites(self) -> int:
        """The number of sites."""
        if self.partition.natural:
            return len(self._dealt[0]["offsets"]) - 1
        return self.wanted or self.partition.sites or _SITES

    @cached_property
    def names(self) -> Sequence[str]:
        """The sites' names: 'site-1' .. 'site-N', or the values of the natural id as text."""
        if not self.partition.natural:
            return Names(self.sites)
        arrays, _ = self._dealt
        firsts = arrays["order"][arrays["offsets"][:-1]]
        return Names(self.sites, self._sets[0].raw(self.partition.column)[firsts])

    def site(self, which: int | str) -> SiteData:
        """What a site holds, by its number (from 0) or its name, gathered anew at each call.

        'server' stands for the server, which holds no training set.
        """
        if which == "server":
            return SiteData(None, self.server)
        arrays, _ = self._dealt
        train, test = self._sets
        try:
            number = self.names.index(which) if isinstance(which, str) else which
        except ValueError as nobody:
            raise DataError(f"there is no such site: {nobody}") from nobody
        if not 0 <= number < len(arrays["offsets"]) - 1:
            raise DataError(f"there is no site number {number}: this split has sites 0..{self.sites - 1}")
        # Slicing by Python's own integers is four times as fast as by NumPy's.
        first, last = arrays["offsets"][number : number + 2].tolist()
        mine = train.part(arrays["order"][first:last])
        if test is None or "test_order" not in arrays:
            return SiteData(mine, None)
        first, last = arrays["test_offsets"][number : number + 2].tolist()
        held_out = arrays["test_order"][first:last]
        return SiteData(mine, test.part(held_out) if len(held_out) else None)

    def samples(self, names: Sequence[str]) -> Array:
        """How many training samples these sites hold: int64 [names]; 1 for the server, which trains nothing."""
        offsets = self._dealt[0]["offsets"]
        places = np.array([-1 if name == "server" else self.names.index(name) for name in names])
        return np.where(places < 0, 1, offsets[places + 1] - offsets[places])

    @property
    def evaluators(self) -> list[str]:
        """The names of the sites that hold held-out data."""
        arrays, _ = self._dealt
        if "test_offsets" not in arrays:
            return []
        return [self.names[int(number)] for number in np.flatnonzero(np.diff(arrays["test_offsets"]))]

    @property
    def server(self) -> Dataset | None:
        """The whole held-out set, if the server holds it."""
        return self._sets[1] if self._held_by in ("server", "both") else None

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes' names, or their values as text; ('samples',) for a real-valued target."""
        return self._classes.labels or ("samples",)

    def table(self) -> Array:
        """Training samples per site and class: int64 [sites, classes]; one column for a real-valued target."""
        arrays, _ = self._dealt
        columns = len(self.labels)
        owner = np.repeat(np.arange(self.sites), np.diff(arrays["offsets"]))
        cells = owner * columns + self._classes.train[arrays["order"]]
        return np.bincount(cells, minlength=self.sites * columns).reshape(self.sites, columns)

    def describe(self) -> dict[str, Any]:
        """Plain values for a run's record."""
        counts = np.diff(self._dealt[0]["offsets"])
        _, test = self._sets
        return {
            "source": self.source.name,
            "partition": self.partition.name,
            "sites": self.sites,
            "seed": self.seed,
            "samples": int(counts.sum()),
            "smallest": int(counts.min()),
            "largest": int(counts.max()),
            "classes": len(self._classes.labels or ()),
            "held_out": 0 if test is None else len(test),
            "held_out_by": self._held_by,
        }

    @cached_property
    def _sets(self) -> Pair:
        train, test = self.source.load(cache=self.cache)
        if not len(train):
            raise DataError(f"{self.source.name}: there are no training samples")
        if test is None and self.test is not None:
            raise DataError(f"{self.source.name} has no held-out set for test='{self.test}': give the source a test=")
        return train, test

    @cached_property
    def _held_by(self) -> Where | None:
        if self._sets[1] is None:
            return None
        return self.test or ("sites" if self.sites <= 100 else "server")

    @cached_property
    def _classes(self) -> _Classes:
        train, test = self._sets
        target = [data.raw("y") if "y" in train else np.zeros(len(data)) for data in (train, test) if data is not None]
        both = np.concatenate(target)
        if both.ndim != 1 or both.dtype.kind not in "iubU":
            labels, codes = None, np.zeros(len(both), np.int32)
        elif train.classes is None:
            values, _, codes = _distinct(both)
            labels = tuple(str(value) for value in values)
        else:
            labels, codes = train.classes, both.astype(np.int32)
            if int(both.min()) < 0 or int(both.max()) >= len(labels):
                raise DataError(
                    f"{self.source.name}: 'y' must lie in 0..{len(labels) - 1}, the positions of its classes"
                )
        return _Classes(labels, codes[: len(train)], None if test is None else codes[len(train) :])

    @cached_property
    def _dealt(self) -> disk.Kept:
        train, test = self._sets
        if self.partition.natural:
            codes, held_out = _natural(self.partition.column, train, test)
            if self.wanted not in (None, found := int(codes.max()) + 1):
                raise DataError(f"{self.partition.name} makes {found} sites, not {self.wanted}: leave out sites=")
        else:
            codes, held_out = self._classes.train, self._classes.test
            if self.partition.uses_classes and self._classes.labels is None:
                raise DataError(
                    f"{self.partition.name} needs classes, but 'y' is real-valued or absent: use iid() or by()"
                )
        deal = partial(self._deal, codes, held_out)
        if not self.cache:
            return deal()
        # The dealing depends on the codes alone, so they, not the whole content, make the key.
        said = (_DEALING, self.partition.name, str(self.wanted), str(self.seed), str(self.test))
        return disk.keep("splits", disk.digest(*said, codes, "" if held_out is None else held_out), deal)

    def _deal(self, codes: Array, held_out: Array | None) -> disk.Kept:
        sites = int(codes.max()) + 1 if self.partition.natural else self.sites
        order, offsets = self.partition.assign(codes, sites, stream(self.seed, "partition"))
        if (empty := np.flatnonzero(np.diff(offsets) == 0)).size:
            raise DataError(
                f"site '{Names(sites)[int(empty[0])]}' has no training samples under {self.partition.name} "
                f"({empty.size} of {sites} sites have none): ask for at_least=1"
            )
        arrays = {"order": order, "offsets": offsets}
        where = self.test or ("sites" if sites <= 100 else "server")
        if held_out is not None and where != "server":
            if not self.partition.natural:
                held_out, chosen = _like_training(codes, (order, offsets), held_out)
            else:
                chosen = np.arange(len(held_out))
            arrays["test_order"], arrays["test_offsets"] = grouped(chosen, held_out, sites)
        return arrays, {}


def sites(parts: Mapping[str, Any]) -> Split:
    """Data that already lie by site.

    Args:
        parts: site name -> Dataset, mapping of columns, pair (x, y), or {"train": ..., "test": ...} of these.

    The columns are joined, with a column `site` added.

    Raises:
        DataError: no sites, a site without training samples, or sites with different columns.

    >>> split = sites({"north": (np.zeros((3, 2)), [0, 1, 1]), "south": (np.ones((1, 2)), [0])})
    >>> list(split.names), split.table().tolist()
    (['north', 'south'], [[1, 2], [1, 0]])
    """
    if not parts:
        raise DataError("sites: there are none")
    train: dict[str, Dataset] = {}
    test: dict[str, Dataset] = {}
    for name, part in parts.items():
        both = part if isinstance(part, Mapping) and "train" in part else {"train": part}
        train[name] = dataset(both["train"])
        if not len(train[name]):
            raise DataError(f"site '{name}' has no training samples: leave it out")
        if both.get("test") is not None:
            test[name] = dataset(both["test"])
    first = next(iter(train.values()))
    pair = with_classes(_joined(train, first), _joined(test, first) if test else None)
    source = Source(f"{len(parts)} sites", partial(given, pair))
    return Split(source, by("site"), test="sites" if test else None, cache=False)


def _rebuilt(name: str, sets: Sequence[Any], dealt: disk.Kept, settings: Mapping[str, Any]) -> Split:
    train, test = (parts and Dataset(*parts) for parts in sets)
    split = Split(**{**settings, "source": Source(name, partial(given, (train, test)))})
    vars(split).update(_sets=(train, test), _dealt=dealt)
    return split


def given(pair: Pair) -> Pair:
    """The reader of a source that is in memory."""
    return pair


def _joined(parts: Mapping[str, Dataset], like: Dataset) -> Dataset:
    for name, part in parts.items():
        if set(part.columns) != set(like.columns) or (part.scale, part.classes) != (like.scale, like.classes):
            raise DataError(f"site '{name}' has columns {part.columns}, the first site {like.columns}; or other scales")
    try:
        columns = {name: np.concatenate([part.raw(name) for part in parts.values()]) for name in like.columns}
    except ValueError as cause:
        raise DataError(f"the sites' columns differ in shape: {cause}") from cause
    names = np.repeat(np.array(list(parts)), [len(part) for part in parts.values()])
    return Dataset({**columns, "site": names}, like.scale, like.classes)


def packed(pair: Pair) -> disk.Kept:
    """Both sets as named arrays, and what else there is to know of them as plain values."""
    arrays: dict[str, Array] = {}
    about: dict[str, Any] = {}
    for part, data in zip(("train", "test"), pair, strict=True):
        if data is not None:
            arrays |= {f"{part}/{name}": column for name, column in data.whole().items()}
            about[part] = {"scale": dict(data.scale), "classes": data.classes}
    return arrays, about


def unpacked(arrays: Mapping[str, Array], about: Mapping[str, Any], part: str) -> Dataset:
    """The set `train` or `test` of what was packed."""
    columns = {name.removeprefix(f"{part}/"): array for name, array in arrays.items() if name.startswith(f"{part}/")}
    scale = {name: (float(factor), float(shift)) for name, (factor, shift) in about[part]["scale"].items()}
    classes = about[part]["classes"]
    return Dataset(columns, scale, None if classes is None else tuple(classes))


def _natural(column: str, train: Dataset, test: Dataset | None) -> tuple[Array, Array | None]:
    """The sites' numbers, in order of first appearance, of the training and the held-out samples."""
    values, firsts, codes = _distinct(train.raw(column))
    rank = np.argsort(np.argsort(firsts)).astype(np.int32)
    if test is None:
        return rank[codes], None
    asked = test.raw(column)
    found = np.minimum(np.searchsorted(values, asked), len(values) - 1)
    if len(unknown := asked[values[found] != asked]):
        raise DataError(f"by({column!r}): the held-out set has '{unknown[0]}', of which there are no training samples")
    return rank[codes], rank[found]


def _distinct(values: Array) -> tuple[Array, Array, Array]:
    """The different values in ascending order, where each is first, and int32 [n], which of them each value is.

    np.unique, but by counting instead of sorting where whole numbers lie close together.
    """
    low, high = (int(values.min()), int(values.max())) if values.dtype.kind in "iu" else (0, 2**63)
    if high >= 2**63 or high - low > 2 * len(values) + 2**16:
        found, firsts, codes = np.unique(values, return_index=True, return_inverse=True)
        return found, firsts, codes.astype(np.int32)
    places = values.astype(np.int64) - low
    first = np.full(high - low + 1, -1)
    first[places[::-1]] = np.arange(len(values))[::-1]  # of equal places the last assignment stays
    found = np.flatnonzero(first >= 0)
    code = np.zeros(len(first), np.int32)
    code[found] = np.arange(len(found))
    return (found + low).astype(values.dtype), first[found], code[places]


def _like_training(codes: Array, dealt: Dealt, held_out: Array) -> tuple[Array, Array]:
    """(owners, samples): each class's held-out samples in proportion to the sites' training samples of the class.

    By largest remainders, in whole numbers.  Equal remainders are served in turn, going on from class to class, so
    that many small sites do not leave the last ones with nothing.  A class without training samples goes by sites'
    sizes.
    """
    order, offsets = dealt
    count = len(offsets) - 1
    owner = np.repeat(np.arange(count), np.diff(offsets))
    present = codes[order]
    owners, samples, turn = [], [], 0
    for code in np.unique(held_out):
        mine = np.flatnonzero(held_out == code)
        weights = np.bincount(owner[present == code], minlength=count)
        weights = weights if weights.any() else np.diff(offsets)
        seats, remainders = np.divmod(len(mine) * weights, weights.sum())
        rest = len(mine) - int(seats.sum())
        served = (np.argsort(-np.roll(remainders, -turn), kind="stable")[:rest] + turn) % count
        seats[served] += 1
        turn = (turn + rest) % count
        owners.append(np.repeat(np.arange(count), seats))
        samples.append(mine)
    return np.concatenate(owners), np.concatenate(samples)
