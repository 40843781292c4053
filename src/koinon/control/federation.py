"""What a controller sees of the federation: its sites, its rounds, and calls that read top to bottom.

The concurrency belongs to the transport; here everything happens in order.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from koinon.aggregate import Aggregator
from koinon.control.sampler import Sampler
from koinon.errors import JobError, QuorumNotReached
from koinon.filters import NOTHING
from koinon.payload import Arrays, Kind, Payload, codec, tree
from koinon.streams import stream
from koinon.task import Board, Failure, Job, Result, Task
from koinon.tracking import SERVER, Commit, Tracker


class Transport(Protocol):
    """How tasks get to sites and results back."""

    def wait(self, board: Board, task: Task) -> None:
        """Return when the board may have changed, at the latest at the task's deadline."""

    @property
    def states(self) -> Mapping[str, Any]:
        """What the sites remember, where they live in this process (a simulation): part of a commit."""

    def now(self) -> float:
        """Seconds of the clock that deadlines are given in."""


class Store(Protocol):
    """Where commits are kept."""

    def commit(self, commit: Commit) -> None:
        """Make a round durable."""


@dataclass(frozen=True)
class Update:
    """One site's answer as a controller sees it: decoded and checked."""

    site: str
    arrays: Arrays
    weight: float
    metrics: Mapping[str, float]


class _Refused(Exception):
    """One site's answer cannot be counted; the round goes on if the quorum remains."""


@dataclass(frozen=True)
class _Sent:
    """The model that is out at the sites: as it is, as it travels, in bytes, and what may come back."""

    version: int
    model: Arrays
    payload: Payload
    size: int
    expected: Arrays


@dataclass(frozen=True)
class Sites:
    """Who takes part: all names, and of these the ones that hold data to evaluate on."""

    names: Sequence[str]
    evaluators: Sequence[str] = ()


class Federation:
    """The sites, the rounds, and what a controller can ask of them.

    Args:
        job: what runs.
        sites: who takes part.
        transport: how tasks travel.
        store: where rounds are made durable.
        tracker: who is told.
        seed: of every random stream of the run.
        last: the commit to go on from.
    """

    def __init__(
        self,
        job: Job,
        sites: Sites,
        *,
        transport: Transport,
        store: Store,
        tracker: Tracker,
        seed: int = 0,
        last: Commit | None = None,
    ) -> None:
        self.job, self.sites, self.seed = job, sites.names, seed
        self.board = Board()
        self._evaluators, self._last = sites.evaluators, last
        self._transport, self._store, self._tracker = transport, store, tracker
        self._round, self._posted, self._began = (last.round if last else 0), 0, 0.0
        self._sent: _Sent | None = None  # the latest
        self._out: dict[str, _Sent] = {}  # what each open task took along
        self._held: dict[str, int] = {}  # the version of the model that each site has fetched already
        self._tally: dict[str, float] = defaultdict(float)

    # -- the rounds ------------------------------------------------------------------------------------------

    def start(self, **state: Any) -> SimpleNamespace:
        """The state that `commit` will keep: as given, or as it was at the last commit."""
        if self._last and self._evaluators and "evaluate" in self.job.answers:
            self._encoded(self._last.state["model"])  # it went down to be evaluated: encoded then, held by the sites
            self._held = dict.fromkeys(self._evaluators, 0)
        return SimpleNamespace(**(self._last.state if self._last else state))

    def rounds(self, count: int) -> Iterator[int]:
        """The rounds that are left of `count`, from 1, after the last commit."""
        for number in range(self._round + 1, count + 1):
            self._round = number
            self._began = self._tracker.now()
            self._tally.clear()
            self._tracker.emit("round", self._round)
            yield number

    def commit(self, at: SimpleNamespace) -> None:
        """Evaluate `at.model`, then make all of `at` and the sites' states durable.

        A run that is killed goes on after its last commit, to the same bits.
        """
        metrics = self._evaluate(at.model)
        values: dict[str, Any] = {**metrics, **self._tally, "seconds": self._tracker.now() - self._began}
        commit = Commit(self._round, vars(at), self._transport.states, values, self._tracker.now())
        self._store.commit(commit)
        self._tracker.emit("commit", self._round, values=values)

    # -- the sites -------------------------------------------------------------------------------------------

    def broadcast(self, name: str, model: Arrays, *, to: Sampler | Sequence[str]) -> Task:
        """Ask sites to work on a model.  Returns at once; `fold` and `stream` wait for the answers.

        Raises:
            JobError: nobody is asked, or no executor of the job answers this task.
        """
        if name not in self.job.answers:
            raise JobError(f"no executor of this job answers the task '{name}'")
        if isinstance(to, Sampler):
            to = to.select(self.sites, stream(self.seed, f"sampler {name}", self._round))
        asked = tuple(to)
        if not asked:
            raise JobError(f"round {self._round}: the sampler chose no site for '{name}'")
        self._posted += 1
        quorum = max(1, math.ceil(self.job.quorum * len(asked)))
        sent = self._encoded(model)
        task = Task(f"{self._posted}-{name}", name, self._round, sent.payload, asked, quorum)
        self.board.post(task)
        self._out[task.id] = sent
        return task

    def stream(self, task: Task) -> Iterator[Update]:
        """The answers to a task as they come, each decoded and checked; the task is closed at the end.

        What cannot be counted is refused by the site's name, and the round goes on.

        Raises:
            QuorumNotReached: too few answered; the first site's traceback is kept.
        """
        for update in self._answers(task):
            yield replace(update, arrays=tree.map(np.copy, update.arrays))

    def _answers(self, task: Task, kind: Kind | None = None) -> Iterator[Update]:
        """As `stream`, but the arrays last only until the next answer; answers of another kind are refused."""
        while True:
            while result := self.board.take(task.id):
                try:
                    yield self._receive(task, result, kind)
                except _Refused as refusal:
                    self.board.refuse(task.id, result.site, str(refusal))
            progress = self.board.progress(task.id, self._transport.now())
            if progress.over:
                break
            self._transport.wait(self.board, task)
        failures = self.board.close(task.id)
        del self._out[task.id]
        for site, failure in failures.items():
            self._tracker.emit("refused", task.round, site, vars(failure))
        if progress.answered < task.quorum:
            raise _short(task, progress.answered, failures)
        if task.name == "train":
            self._tally["asked"] += progress.asked
            self._tally["answered"] += progress.answered

    def fold(self, aggregator: Aggregator, task: Task) -> Arrays:
        """Wait for the answers to a task and fold them into one update."""
        state = aggregator.init()
        losses: list[tuple[float, float]] = []
        for update in self._answers(task, "weight_diff"):
            state = aggregator.add(state, update.arrays, update.weight)
            if "loss" in update.metrics:
                losses.append((update.metrics["loss"], update.weight))
        if losses:
            self._tally["train_loss"] = _mean(losses)
        return self.job.upload.finish(aggregator.finish(state))

    def send(self, name: str, model: Arrays, *, to: str) -> Update:
        """Ask one site to work on a model, and wait for its answer."""
        (update,) = self.stream(self.broadcast(name, model, to=[to]))
        return update

    def log(self, **metrics: float) -> None:
        """Record numbers of this round for the federation as a whole."""
        self._tracker.emit("metric", self._round, values=metrics)

    def abort(self, reason: str) -> None:
        """End the run as failed.

        Raises:
            JobError: always.
        """
        raise JobError(f"round {self._round}: {reason}")

    # -- inside ----------------------------------------------------------------------------------------------

    def _encoded(self, model: Arrays) -> _Sent:
        """The model as it goes down; encoded once, however many tasks and sites get it."""
        if self._sent is None or self._sent.model is not model:
            payload, filter_ = Payload("weights", model), self.job.download
            if filter_ is not NOTHING:
                payload, _ = filter_.encode(payload, filter_.init(), stream(self.seed, "download", self._round))
            expected = tree.floating(model)
            for name in self.job.upload.keeps(frozenset(expected)):
                del expected[name]
            version = self._sent.version + 1 if self._sent else 0
            self._sent = _Sent(version, model, payload, codec.size(payload), expected)
        return self._sent

    def _receive(self, task: Task, result: Result, kind: Kind | None) -> Update:
        """Decode and check one answer, and count its bytes.

        Raises:
            _Refused: it cannot be counted.
        """
        assert result.payload is not None
        sent = self._out[task.id]
        bytes_up, bytes_down = codec.size(result.payload), sent.size
        if self._held.get(result.site) == sent.version:
            bytes_down = 0  # a site fetches a given model once
        self._held[result.site] = sent.version
        if result.site != SERVER:  # what the server does at home crosses nothing
            self._tally["bytes_up"] += bytes_up
            self._tally["bytes_down"] += bytes_down
        try:
            payload = self.job.upload.decode(result.payload) if result.payload.arrays else result.payload
        except Exception as error:  # the bytes are a stranger's, and so is what a filter makes of them
            raise _Refused(f"{self.job.upload.name} cannot decode its answer: {error}") from error
        if kind not in (None, payload.kind):
            raise _Refused(f"it answered '{task.name}' with {payload.kind}; {kind} is needed")
        update = _update(result.site, payload, sent.expected)
        if payload.kind == "weight_diff":
            values: dict[str, Any] = {f"train_{key}": value for key, value in update.metrics.items()}
            values |= {"train_samples": update.weight, "began": self._tracker.now() - result.seconds}
            values |= {"seconds": result.seconds, "bytes_up": bytes_up, "bytes_down": bytes_down}
            self._tracker.emit("result", task.round, result.site, values)
        return update

    def _evaluate(self, model: Arrays) -> dict[str, float]:
        """The model's metrics over all held-out samples, and each evaluator's own in the table."""
        if not self._evaluators or "evaluate" not in self.job.answers:
            return {}
        per_metric: dict[str, list[tuple[float, float]]] = {}
        own: dict[str, float] = {}
        for update in self._answers(self.broadcast("evaluate", model, to=self._evaluators)):
            self._tracker.emit("metric", self._round, update.site, {**update.metrics, "samples": update.weight})
            if update.site == SERVER:
                own = dict(update.metrics)
            for name, value in update.metrics.items():
                per_metric.setdefault(name, []).append((value, update.weight))
        return own or {name: _mean(pairs) for name, pairs in per_metric.items()}


def _update(site: str, payload: Payload, like: Arrays) -> Update:
    """An answer, checked: a weight and metrics that are numbers, and arrays that fit the model and are finite.

    Raises:
        _Refused: what is wrong.
    """
    weight, metrics = payload.values.get("weight"), payload.values.get("metrics", {})
    if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight <= 0:
        raise _Refused(f"its weight is {weight!r}: a positive number (of samples) is needed")
    if not isinstance(metrics, Mapping):
        raise _Refused(f"its metrics are a {type(metrics).__name__}: a mapping of names to numbers is needed")
    if odd := [name for name, value in metrics.items() if not isinstance(value, (int, float))]:
        raise _Refused(f"its metric '{odd[0]}' is {metrics[odd[0]]!r}: a number is needed")
    if payload.kind == "weight_diff" and (wrong := tree.mismatch(payload.arrays, like)):
        raise _Refused(f"it sent {wrong}. Is it running the same model code?")
    if name := tree.finite(payload.arrays):
        raise _Refused(f"its '{name}' holds NaN or infinity. Is the learning rate too high for its data?")
    return Update(site, payload.arrays, float(weight), {str(key): float(value) for key, value in metrics.items()})


def _mean(pairs: Sequence[tuple[float, float]]) -> float:
    """The weighted mean of (value, weight) pairs, without those whose value is not a number."""
    counted = [(value, weight) for value, weight in pairs if not math.isnan(value)]
    total = sum(weight for _, weight in counted)
    return sum(value * weight for value, weight in counted) / total if total else math.nan


def _short(task: Task, answered: int, failures: Mapping[str, Failure]) -> QuorumNotReached:
    """Say who failed and why, the most frequent reason first."""
    where = f"round {task.round}: " if task.round else ""
    message = f"{where}{answered} of {len(task.sites)} sites answered '{task.name}', {task.quorum} are needed"
    for reason, count in Counter(failure.reason for failure in failures.values()).most_common(3):
        who = [site for site, failure in failures.items() if failure.reason == reason]
        shown = ", ".join(f"'{site}'" for site in who[:3]) + (" …" if count > 3 else "")
        message += f"\n  {count} failed ({shown}): {reason}"
    return QuorumNotReached(message, next((f.traceback for f in failures.values() if f.traceback), ""))
