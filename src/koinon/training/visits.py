"""What the sites of a cohort visit, step by step: rows gathered straight from shared columns into buffers made once.

Sites stand in descending order of their steps, so that those still at work at any step are the first ones.  A batch
smaller than its neighbours is filled up with a row of the site's own, which weighs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from koinon.errors import DataError, extra
from koinon.training.boost import Halt
from koinon.training.layers import FEW

torch: Any = extra("torch", "torch")


TOGETHER = 1 << 18
"""Bytes of samples that are gathered at once, for several steps if these are small: the cache has room for more."""


@dataclass(frozen=True)
class Work:
    """A site's part of a cohort: samples (columns x and y), batches as indices into them, what it remembers, and when
    it may stop."""

    data: Any
    batches: Sequence[np.ndarray]
    state: MutableMapping[str, Any] = field(default_factory=dict)
    halt: Halt | None = None


@dataclass(frozen=True)
class Visit:
    """One step of a cohort: the batches of its first `sites` sites, one after the other, of equal length.

    `counts` rows of each are real; `weights`, one a row, are the reciprocals of these, or 0 for a filler.
    """

    sites: int
    counts: np.ndarray
    x: Any
    y: Any
    weights: Any


class Visits:
    """All steps of a cohort.

    Args:
        work: of each site.
        kind: the network's floating type.
        device: where it computes.
        buffers: kept between cohorts: fresh pages cost as much as the arithmetic.
    """

    def __init__(self, work: Sequence[Work], kind: Any, device: str, buffers: dict[str, np.ndarray]) -> None:
        if empty := [site for site in work if not site.batches]:
            raise DataError(f"a site of {len(empty[0].data)} samples has no batch")
        steps = [len(site.batches) for site in work]
        self.order = sorted(range(len(work)), key=lambda index: -steps[index])  # stable: ties keep their place
        self._placed = [work[index] for index in self.order]
        self._counts = np.zeros((len(work), max(steps)), np.intp)
        for place, site in enumerate(self._placed):
            self._counts[place, : len(site.batches)] = [len(batch) for batch in site.batches]
        self.own_steps, self.widths = np.count_nonzero(self._counts, axis=1), self._counts.max(0).tolist()
        self._kind, self._device, self._buffers = kind, device, buffers
        self._shared = all(site.data.stored is work[0].data.stored for site in work)
        self._columns = {name: self._column(name) for name in ("x", "y")}

    def __iter__(self) -> Iterator[Visit]:
        counts = self._counts
        real = np.arange(counts.max()) < counts[:, :, None]
        rows = self._rows()
        starts = np.cumsum(counts.sum(1)) - counts.sum(1)
        table = np.repeat(rows[starts], real[0].size).reshape(real.shape)
        table[real] = rows
        weights = (real / np.maximum(counts, 1)[:, :, None]).astype(self._weight_kind)
        for start, end, sites, width in self._alike():
            flat = [each[:sites, start:end, :width].swapaxes(0, 1).reshape(-1) for each in (table, weights)]
            x, y = self._gather(flat[0], start if len(self.widths) <= FEW else 0)
            parts = [column.split(sites * width) for column in (x, y, self._put(flat[1]))]
            for at, own in enumerate(zip(*parts, strict=True), start):
                yield Visit(sites, counts[:sites, at], *own)

    def _alike(self) -> Iterator[tuple[int, int, int, int]]:
        """Steps in a row that are gathered at once: from, to, and how many sites and samples of each they all have."""
        shapes = list(zip(np.count_nonzero(self._counts, axis=0).tolist(), self.widths, strict=True))
        sample = sum(column[0].nbytes for column, _ in self._columns.values())
        for (sites, width), run in groupby(range(len(shapes)), shapes.__getitem__):
            steps, many = list(run), max(1, TOGETHER // (sites * width * sample))
            for start in steps[::many]:
                yield start, min(start + many, steps[-1] + 1), sites, width

    def once(self, shares: np.ndarray) -> tuple[Visit, np.ndarray]:
        """The only step of every site, all rows as one batch; each site's rows weigh its share together.

        Returns:
            The visit, and where each site's rows begin.
        """
        counts = self._counts[:, 0]
        x, y = self._gather(self._rows())
        weights = np.repeat(shares[self.order] / counts, counts).astype(self._weight_kind)
        return Visit(1, counts.sum(keepdims=True), x, y, self._put(weights)), np.cumsum(counts) - counts

    def means(self, losses: Any) -> np.ndarray:
        """Each site's mean over its steps, in the callers' order, of sums that stand in the order of visiting."""
        means = np.empty(len(self.order))
        means[self.order] = np.asarray(losses) / self.own_steps
        return means

    @property
    def _weight_kind(self) -> Any:
        return np.float64 if self._kind == torch.float64 else np.float32

    def _rows(self) -> np.ndarray:
        """Row numbers into the columns, batch after batch, site after site."""
        sizes = [len(site.data) for site in self._placed]
        rows = np.concatenate([batch for site in self._placed for batch in site.batches])
        rows = rows + np.repeat(np.cumsum(sizes) - sizes, self._counts.sum(1))
        return np.concatenate([_positions(site.data) for site in self._placed])[rows] if self._shared else rows

    def _column(self, name: str) -> tuple[np.ndarray, Any]:
        """A column that holds all sites' samples, and how its raw numbers are read (a, b)."""
        first = self._placed[0].data
        if self._shared:
            return first.stored[name], first.scale.get(name)
        parts = [site.data[name] for site in self._placed]
        column = self._buffer(f"{name} together", (sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
        return np.concatenate(parts, out=column), None

    def _gather(self, rows: np.ndarray, at: int = 0) -> tuple[Any, Any]:
        """The rows' samples, in buffers of the step `at`."""
        x, y = (self._read(name, rows, at) for name in ("x", "y"))
        return x, y if y.is_floating_point() else y.long()

    def _read(self, name: str, rows: np.ndarray, at: int) -> Any:
        column, scale = self._columns[name]
        buffer = self._buffer(f"{name} {at}", (len(rows), *column.shape[1:]), column.dtype)
        # Clipping never happens; asked for it, NumPy writes straight to `out`.
        read = torch.from_numpy(np.take(column, rows, axis=0, out=buffer, mode="clip"))
        if scale is not None:
            numbers = torch.from_numpy(self._buffer(f"{name} {at} read", buffer.shape, np.dtype(np.float32)))
            read = numbers.copy_(read).mul_(np.float32(scale[0])).add_(np.float32(scale[1]))
        return read.to(self._device, self._kind) if read.is_floating_point() else read.to(self._device)

    def _put(self, array: np.ndarray) -> Any:
        return torch.from_numpy(array).to(self._device)

    def _buffer(self, name: str, shape: Sequence[int], kind: np.dtype) -> np.ndarray:
        wanted = math.prod(shape)
        if name not in self._buffers or len(self._buffers[name]) < wanted or self._buffers[name].dtype != kind:
            # PyTorch's memory begins at a multiple of 64, NumPy's anywhere: a product's last bits depend on it.
            self._buffers[name] = torch.empty(wanted * kind.itemsize, dtype=torch.uint8).numpy().view(kind)
        return self._buffers[name][:wanted].reshape(shape)


def _positions(data: Any) -> np.ndarray:
    """Where the samples of a part stand in the columns that it shares."""
    return np.arange(len(data)) if data.rows is None else data.rows
