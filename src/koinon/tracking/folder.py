"""The run folder: settings, one tidy table, the models, and what a resume needs.  Whole up to the last commit.

    run.json              what runs: settings, seed, versions, partition, state
    metrics.csv           run, round, site, name, value, time
    failures.log          why which site's answer did not count, with its traceback; absent if all did
    commit.json           the last commit; replacing this file *is* the commit
    commits/              the files that commit.json names
    last.safetensors      the last commit's model; best.safetensors: the best one's, its round in the metadata

A process may be killed at any moment: what commit.json does not name was never there.  (Files are renamed into
place but, in a simulation, not forced to disk: a power cut may cost the last rounds, not the folder.)
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from koinon.disk import settle
from koinon.errors import RunError, SettingsError, nearest
from koinon.payload import codec
from koinon.tracking.events import FEDERATION, Event, is_metric
from koinon.tracking.run import Row, read_json

K = TypeVar("K")

SCORE = "accuracy"
"""A job's score by default."""

_SPECIAL = re.compile('[",\r\n]')


@dataclass(frozen=True)
class Commit:
    """A round made durable.

    Args:
        round: which.
        state: the controller's named state; `model` is among it.
        metrics: the federation's numbers of this round.
        time: seconds since the run began.
    """

    round: int
    state: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)
    time: float = 0.0


class Folder:
    """A run folder that is being written: a sink of events and the store of commits.

    Use `create` for a new run and `reopen` for one that is to go on.
    """

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path, self.info = path, info
        self.durable = False
        """A commit is forced to disk before it counts."""
        self._lines: list[str] = []
        self._cell = _quoted(path.name)
        self._commit: dict[str, Any] = read_json(path / "commit.json") or {}

    @classmethod
    def create(cls, path: Path, info: Mapping[str, Any]) -> Folder:
        """Make the folder.

        Raises:
            RunError: it exists.
        """
        try:
            path.mkdir(parents=True)
        except FileExistsError as taken:
            raise RunError(
                f"'{path}' exists: go on from it with `koinon resume {path}`, or name another with --out"
            ) from taken
        (path / "commits").mkdir()
        with (path / "metrics.csv").open("w", newline="") as table:
            csv.writer(table).writerow(Row._fields)
        folder = cls(path, {**info, "name": path.name})
        folder.set_state("running")
        return folder

    @classmethod
    def reopen(cls, path: Path, info: Mapping[str, Any]) -> Folder:
        """Open a folder to go on after its last commit; what came after it is dropped.

        Raises:
            RunError: there is no run, it still runs, its settings are not those of `info`, or it has done more rounds.
        """
        before = read_json(path / "run.json")
        if before is None:
            raise RunError(f"there is no run in '{path}' to go on from")
        if state_of(before) == "running":
            raise RunError(f"'{path}' still runs, in process {before['pid']}: stop it first")
        was, now = _lasting(before), _lasting(info)
        for key in ("seed", "setting", "partition"):
            if was[key] != now[key]:
                raise RunError(f"'{path}' was begun with a different {key}: {_difference(was[key], now[key])}")
        folder = cls(path, {**before, "rounds": info.get("rounds"), "settings": info.get("settings")})
        done, wanted = folder._commit.get("round", 0), info.get("rounds")
        if wanted != before.get("rounds") and wanted is not None and wanted < done:
            raise RunError(f"'{path}': {done} rounds are done already: give --rounds {done + 1} or more")
        with (path / "metrics.csv").open("r+b") as table:
            table.truncate(folder._commit.get("metrics_bytes", len(",".join(Row._fields)) + 2))
        if folder._commit:
            folder._tidy()  # a kill may have come between the commit and this
        folder.set_state("running")
        return folder

    def __call__(self, event: Event) -> None:
        """Keep the event's numbers until the next commit; write down at once why a site failed."""
        if event.kind == "refused":
            with (self.path / "failures.log").open("a") as log:
                said = event.values.get("traceback") or event.values.get("reason")
                log.write(f"round {event.round}, site '{event.site}': {said}\n")
        if event.kind in ("result", "metric"):
            before, after = f"{self._cell},{event.round},{_quoted(event.site)},", f",{event.time:.6f}\r\n"
            self._lines += [
                f"{before}{_quoted(name)},{float(value)!r}{after}"
                for name, value in event.values.items()
                if isinstance(value, (int, float))
            ]

    def commit(self, commit: Commit) -> None:
        """Make a round durable: all of it or nothing.

        Raises:
            SettingsError: the job names a score that its first evaluation does not have.
        """
        score = self.info.get("score", SCORE)
        if not self._commit.get("best") and score not in (SCORE, *commit.metrics):  # only the default may be missing
            _missed(score, [name for name in commit.metrics if is_metric(name)])
        self(Event("metric", commit.time, commit.round, FEDERATION, commit.metrics))
        model, state = (f"commits/{what}-{commit.round:05d}.safetensors" for what in ("model", "state"))
        rest = {name: value for name, value in commit.state.items() if name != "model"}
        _write(self.path / model, codec.pack(commit.state["model"], round=str(commit.round)), self.durable)
        _write(self.path / state, codec.pack(rest), self.durable)
        named = {"round": commit.round, "time": commit.time, "model": model, "state": state}
        after = {**named, "metrics_bytes": self._append(), "best": self._best(named, commit.metrics)}
        write_json(self.path / "commit.json", after, self.durable)
        self._commit = after
        self._tidy()

    def flush(self) -> None:
        """Write numbers that were measured after the last commit."""
        self._commit["metrics_bytes"] = self._append()
        write_json(self.path / "commit.json", self._commit)

    def last(self) -> Commit | None:
        """The last commit, or None."""
        if not self._commit:
            return None
        named = self._commit
        kept = codec.unpack((self.path / named["state"]).read_bytes())
        model = codec.unpack((self.path / named["model"]).read_bytes())
        return Commit(named["round"], {"model": model, **kept}, {}, named["time"])

    def set_state(self, state: str, reason: str = "") -> None:
        """Record how the run stands."""
        self.info = {**self.info, "state": state, "reason": reason, "pid": os.getpid(), "pid_since": born(os.getpid())}
        write_json(self.path / "run.json", self.info)

    # -- inside ----------------------------------------------------------------------------------------------

    def _append(self) -> int:
        """Write the lines that were kept; the length of the table afterwards."""
        with (self.path / "metrics.csv").open("ab") as table:
            table.write("".join(self._lines).encode())
            self._lines.clear()
            if self.durable:
                table.flush()
                os.fsync(table.fileno())
            return table.tell()

    def _best(self, named: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any] | None:
        """The best commit so far, by the metric of exactly that commit."""
        before: dict[str, Any] | None = self._commit.get("best")
        score = scored_by(wanted := self.info.get("score", SCORE), metrics)
        if score is None or math.isnan(metrics[score]) or (before and before["metric"] == wanted != score):
            return before
        here = {"metric": score, "value": metrics[score], "round": named["round"], "model": named["model"]}
        if before is None or before["metric"] != score:
            return here
        better = here["value"] < before["value"] if lower_is_better(score) else here["value"] > before["value"]
        return here if better else before

    def _tidy(self) -> None:
        """Give the last and the best model their lasting names; drop what the commit does not name."""
        best = self._commit["best"]
        named = {self._commit["model"], self._commit["state"]} | ({best["model"]} if best else set())
        _link(self.path / self._commit["model"], self.path / "last.safetensors")
        if best and best["round"] == self._commit["round"]:
            _link(self.path / best["model"], self.path / "best.safetensors")
        for path in (self.path / "commits").iterdir():
            if f"commits/{path.name}" not in named:
                path.unlink()


def lower_is_better(metric: str) -> bool:
    """True of losses."""
    return metric == "loss" or metric.endswith("_loss")


def ranked(scores: Mapping[K, float], metric: str) -> list[K]:
    """The keys in order of their scores, the best first; of equals, the first first."""
    return sorted(scores, key=scores.__getitem__, reverse=not lower_is_better(metric))


def scored_by(wanted: str, metrics: Mapping[str, float]) -> str | None:
    """The metric that picks the best model: the one asked for, else the loss, else none."""
    return next((name for name in (wanted, "loss") if name in metrics), None)


def _missed(score: str, measured: Sequence[str]) -> None:
    """Refuse a score that an evaluation lacks; where nothing was evaluated, it may still come."""
    if measured:
        raise SettingsError(f"score='{score}' is no metric of this job's evaluation: {nearest(score, measured)}")


def state_of(info: Mapping[str, Any]) -> str:
    """How a run really stands: one that claims to run in a process that is gone was killed."""
    if info.get("state") != "running" or info.get("pid") == os.getpid():
        return "killed" if info.get("state") == "running" else str(info.get("state"))
    try:
        os.kill(int(info["pid"]), 0)
    except (ProcessLookupError, ValueError):
        return "killed"
    except PermissionError:
        pass
    since, then = born(info["pid"]), info.get("pid_since")
    return "running" if None in (since, then) or since == then else "killed"  # otherwise the number is another's now


def born(pid: int) -> str | None:
    """When a process began, in ticks of the machine's clock; None where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def next_free(root: Path, stem: str) -> Path:
    """The first of root/stem-1, root/stem-2 … that is not taken."""
    taken = {path.name for path in root.iterdir()} if root.is_dir() else set()
    number = 1
    while f"{stem}-{number}" in taken:
        number += 1
    return root / f"{stem}-{number}"


def write_json(path: Path, content: Mapping[str, Any], durable: bool = False) -> None:
    """Replace a file by a JSON object, at once."""
    _write(path, json.dumps(content, indent=1, ensure_ascii=False).encode(), durable)


@lru_cache(maxsize=1 << 16)
def _quoted(text: str) -> str:
    """A cell of a CSV file.  (Python's own writer takes several times as long for the many rows of many sites.)"""
    return '"' + text.replace('"', '""') + '"' if _SPECIAL.search(text) else text


def _write(path: Path, data: bytes, durable: bool = False) -> None:
    """Put bytes at a path, whole or not at all; after a power cut too, if it shall be durable."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    if durable:
        settle(temporary)
    temporary.replace(path)
    if durable:
        settle(path.parent)


def _link(target: Path, name: Path) -> None:
    """Give a file a second name in place of whatever had it."""
    if name.exists() and name.samefile(target):
        return  # a rename onto itself would do nothing, and leave the temporary name
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(target)
    except OSError:  # some file systems have no hard links
        shutil.copyfile(target, temporary)
    temporary.replace(name)


def _lasting(info: Mapping[str, Any]) -> dict[str, Any]:
    """What may not change when a run goes on: all of its settings but the number of rounds."""
    settings = dict(info.get("settings") or {})
    if isinstance(controller := settings.get("controller"), dict):
        settings["controller"] = {name: value for name, value in controller.items() if name != "rounds"}
    return {"seed": info.get("seed"), "setting": settings, "partition": info.get("partition")}


def _difference(before: Any, after: Any) -> str:
    """The first entry in which two settings differ."""
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        before, after = ({str(index): entry for index, entry in enumerate(entries)} for entries in (before, after))
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *after]:
            if before.get(key) != after.get(key):
                return f"{key}: {_difference(before.get(key), after.get(key))}"
    return f"{str(before)[:80]} then, {str(after)[:80]} now"
