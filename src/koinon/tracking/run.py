"""Reading a run back: its settings and its one tidy table (run, round, site, name, value, time)."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from koinon.errors import RunError, nearest
from koinon.payload import Arrays, codec
from koinon.tracking.events import FEDERATION, SERVER


class Row(NamedTuple):
    """One number that a run measured.  `time` is in seconds since the run began."""

    run: str
    round: int
    site: str
    name: str
    value: float
    time: float


@dataclass(frozen=True)
class Run:
    """A run on disk.

    Args:
        path: its folder.
        info: what `run.json` holds: name, state, seed, settings, versions, partition, best, reason.
        known: the whole table, if it is not to be read from the folder.
    """

    path: Path
    info: dict[str, Any]
    known: list[Row] | None = None

    @cached_property
    def rows(self) -> list[Row]:
        """The whole table, in the order in which it was measured; read when it is first asked for, since it has many.

        Raises:
            RunError: the folder is gone.
        """
        return list(_rows(self.path / "metrics.csv")) if self.known is None else self.known

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    def series(self, name: str, site: str = FEDERATION) -> list[Row]:
        """One number over the rounds, in order of rounds."""
        return sorted((row for row in self.rows if row.name == name and row.site == site), key=lambda row: row.round)

    def by_site(self, name: str) -> dict[str, dict[int, float]]:
        """One number as {site: {round: value}}, for the sites only."""
        table: dict[str, dict[int, float]] = {}
        for row in self.rows:
            if row.name == name and row.site not in (FEDERATION, SERVER):
                table.setdefault(row.site, {})[row.round] = row.value
        return table

    def model(self, which: str = "last") -> Arrays:
        """The `last` or the `best` committed model's named arrays."""
        path = self.path / f"{which}.safetensors"
        if not path.exists():
            raise RunError(f"run '{self.name}' has no {which} model: it was stopped before its first commit")
        arrays: Arrays = codec.unpack(path.read_bytes())
        return arrays


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, or None where there is no file."""
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def read(path: str | Path) -> Run:
    """Read a run folder.

    Raises:
        RunError: there is none at `path`; the nearest run beside it is named.
    """
    folder = Path(path)
    if (info := read_json(folder / "run.json")) is None:
        beside = [run.name for run in folders(folder.parent)]
        raise RunError(f"there is no run in '{folder}': {nearest(folder.name, beside)}")
    if commit := read_json(folder / "commit.json"):  # newer than run.json where a run was killed
        info["best"] = commit.get("best")
    return Run(folder, info)


def folders(root: str | Path) -> list[Path]:
    """The run folders in a folder, oldest first."""
    found = [path.parent for path in Path(root).glob("*/run.json")] if Path(root).is_dir() else []
    return sorted(found, key=lambda path: ((path / "run.json").stat().st_mtime, path.name))


def _rows(table: Path) -> Iterator[Row]:
    if not table.parent.exists():
        raise RunError(f"the run's folder '{table.parent}' is gone, and its numbers with it")
    if not table.exists():
        return
    with table.open(newline="") as lines:
        reader = csv.reader(lines)
        next(reader, None)
        for line in reader:
            if len(line) == len(Row._fields):  # a line cut by a kill is not yet part of the table
                run, round, site, name, value, time = line
                yield Row(run, int(round), site, name, float(value), float(time))
