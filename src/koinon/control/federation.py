"""What a controller sees of the federation: its sites, its rounds, and calls that read top to bottom.

The concurrency belongs to the transport; here everything happens in order.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Protocol, cast

import numpy as np

from koinon.aggregate import Aggregator
from koinon.control.sampler import Known, Sampler
from koinon.errors import JobError, QuorumNotReached
from koinon.filters import NOTHING, Crossing
from koinon.payload import Arrays, Payload, codec
from koinon.streams import stream
from koinon.task import Answers, Board, Failure, Job, Result, Task, Update, checked, expected
from koinon.tracking import SERVER, Commit, Tracker


class Transport(Protocol):
    """How tasks get to sites and results back."""

    def wait(self, board: Board, task: Task | None, aggregator: Aggregator | None) -> None:
        """Return when the board may have changed, at the latest at the task's deadline, or that of any if it is None.

        Answers that were made here may come folded by the aggregator.
        """

    committed: int
    """The last round that is durable; the federation says so.  What sites remember belongs to it."""

    def now(self) -> float:
        """Seconds of the clock that deadlines are given in."""


class Store(Protocol):
    """Where commits are kept."""

    def commit(self, commit: Commit) -> None:
        """Make a round durable."""


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
    """Who takes part: all names; of these the ones that hold data to evaluate on; and what any hold, if known."""

    names: Sequence[str]
    evaluators: Sequence[str] = ()
    samples: Callable[[Sequence[str]], np.ndarray] | None = None


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
        self.evaluators, self._last = sites.evaluators, last
        self._transport, self._store, self._tracker = transport, store, tracker
        self._round, self._posted, self._began = (last.round if last else 0), 0, 0.0
        self._sent: _Sent | None = None  # the latest
        self._out: dict[str, _Sent] = {}  # what each open task took along
        self._held: dict[str, int] = {}  # the version of the model that each site has fetched already
        self._silent: dict[str, dict[str, float]] = {}  # who has not answered, and when it was asked, by open task
        self._known = Known(sites.samples)
        self._heard: deque[tuple[str, Update | Failure]] = deque()  # what `next` has still to tell
        self._told, self._lost = 0, list[tuple[str, Failure]]()  # what it told in this round: answers, and failures
        self._tally: dict[str, float] = defaultdict(float)

    # -- the rounds ------------------------------------------------------------------------------------------

    def start(self, **state: Any) -> SimpleNamespace:
        """The state that `commit` will keep: as given, or as it was at the last commit."""
        if self._last and self.evaluators and "evaluate" in self.job.answers:
            self._encoded(self._last.state["model"])  # it went down to be evaluated: encoded then, held by the sites
            self._held = dict.fromkeys(self.evaluators, 0)
        kept = dict(self._last.state if self._last else state)
        self._known.heard = kept.pop("known", {})
        return SimpleNamespace(**kept)

    def rounds(self, count: int) -> Iterator[int]:
        """The rounds that are left of `count`, from 1, after the last commit."""
        for number in range(self._round + 1, count + 1):
            self._round, self._posted = number, 0
            self._told, self._lost = 0, []
            self._began = self._tracker.now()
            self._tally.clear()
            self._tracker.emit("round", self._round)
            yield number

    def commit(self, at: SimpleNamespace) -> None:
        """Evaluate `at.model`, then make all of `at` and the sites' states durable.

        A run that is killed goes on after its last commit, to the same bits.
        """
        metrics = self._evaluate(at.model) if self.evaluators and "evaluate" in self.job.answers else {}
        values: dict[str, Any] = {**metrics, **self._tally, "seconds": self._tracker.now() - self._began}
        if (simulated := getattr(self._transport, "clock", None)) is not None:
            values["simulated_seconds"] = simulated
        known = {"known": self._known.heard} if self._known.wanted else {}
        self._store.commit(Commit(self._round, vars(at) | known, values, self._tracker.now()))
        self._transport.committed = self._round
        self._tracker.emit("commit", self._round, values=values)

    # -- the sites -------------------------------------------------------------------------------------------

    def broadcast(
        self,
        name: str,
        model: Arrays,
        *,
        to: Sampler | Sequence[str],
        deadline: float | None = None,
        enough: int | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> Task:
        """Ask sites to work on a model.  Returns at once; `fold` and `stream` wait for the answers.

        Args:
            name: of the task.
            model: what they get.
            to: whom.
            deadline: seconds from now after which answers are too late.
            enough: answers after which the others are not waited for.
            values: plain values and arrays that go along; an executor finds them in its payload's values.

        Raises:
            JobError: nobody is asked, or no executor of the job answers this task.
        """
        if name not in self.job.answers:
            raise JobError(f"no executor of this job answers the task '{name}'")
        if isinstance(to, Sampler):
            draw, known, to = to.select, (self._known,) if to.informed else (), self.sites
            self._known.wanted = self._known.wanted or bool(known)
            to = draw(to, stream(self.seed, f"sampler {name}", self._round), *known) if draw else to
        asked = tuple(to)
        if not asked:
            raise JobError(f"round {self._round}: the sampler chose no site for '{name}'")
        self._posted += 1
        quorum = max(1, math.ceil(self.job.quorum * min(len(asked), enough or len(asked))))
        sent = self._encoded(model)
        if values:
            payload = replace(sent.payload, values={**sent.payload.values, **values})
            sent = replace(sent, payload=payload, size=codec.size(payload))
        until = None if deadline is None else self._transport.now() + deadline
        task = Task(
            f"{self._round}.{self._posted}-{name}", name, self._round, sent.payload, asked, quorum, until, enough
        )
        self.board.post(task)
        self._out[task.id], self._silent[task.id] = sent, dict.fromkeys(asked, self._transport.now())
        return task

    def stream(self, task: Task) -> Iterator[Update]:
        """The answers to a task as they come, each decoded and checked; the task is closed at the end.

        What cannot be counted is refused by the site's name, and the round goes on.

        Raises:
            QuorumNotReached: too few answered; the first site's traceback is kept.
        """
        for answers in self._answers([task]):
            yield from answers.updates

    def next(self) -> tuple[str, Update | None]:
        """Wait for whoever is done next, of all who were asked: its name, and its answer if that counts.

        For asynchronous methods: ask some sites, each by a `broadcast` of its own, and another whenever one is done.
        Who failed or was too late is told when its task ends.

        Raises:
            JobError: nobody is at work.
            QuorumNotReached: as many as there are sites were done in this round, and too few answers count.
        """
        while not self._heard:
            if not self.board.tasks:
                raise JobError(f"round {self._round}: nobody is at work who could be waited for: `broadcast` first")
            answers = next(self._answers(list(self.board.tasks.values())))  # the board keeps the others
            self._heard.extend((update.site, update) for update in answers.updates)
            if answers.task not in self.board.tasks:
                self._heard.extend(answers.failures.items())
        site, answer = self._heard.popleft()
        if isinstance(answer, Update):
            self._told += 1
            return site, answer
        self._lost.append((site, answer))
        asked = self._told + len(self._lost)
        quorum = math.ceil(self.job.quorum * asked)
        if asked >= len(self.sites) and self._told < quorum:
            raise _short(self._round, "in turn", self._told, asked, quorum, dict(self._lost))
        return site, None

    def _answers(self, tasks: list[Task], aggregator: Aggregator | None = None) -> Iterator[Answers]:
        """The answers to tasks as they come, folded if there is an aggregator, and at each task's end who failed."""
        while tasks:
            for task in tuple(tasks):
                while answer := self.board.take(task.id):
                    if isinstance(answer, Result):
                        like = self._out[task.id].expected
                        answer = checked(self.job, [answer], task=task.id, like=like, aggregator=aggregator)
                        for site, failure in answer.failures.items():
                            self.board.refuse(task.id, site, failure.reason)
                    self._count(task, answer.updates)
                    if answer.warning:
                        self._tracker.emit("warning", task.round, values={"message": answer.warning})
                    yield answer
                progress = self.board.progress(task.id, self._transport.now())
                if not progress.over:
                    continue
                tasks.remove(task)
                failures = self.board.close(task.id)
                del self._out[task.id]
                for site, failure in failures.items():
                    self._tracker.emit("refused", task.round, site, vars(failure))
                if task.name == "train":
                    self._tally["asked"] += progress.asked
                    self._tally["answered"] += progress.answered
                late = dict.fromkeys(self._silent.pop(task.id), Failure("it was too late"))
                yield Answers(task.id, failures={**late, **failures})
                if progress.answered < task.quorum:
                    what = f"'{task.name}'"
                    raise _short(task.round, what, progress.answered, progress.asked, task.quorum, failures)
            if tasks:
                self._transport.wait(self.board, tasks[0] if len(tasks) == 1 else None, aggregator)

    def fold(self, aggregator: Aggregator, task: Task) -> Arrays:
        """Wait for the answers to a task and fold them into one update."""
        state = aggregator.init()
        losses: list[tuple[float, float]] = []
        for answers in self._answers([task], aggregator):
            if answers.fold is not None and answers.updates:
                state = aggregator.merge(state, answers.fold)
            for update in answers.updates:
                if answers.fold is None:
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

    @property
    def numbers(self) -> Mapping[str, float]:
        """What this round has said so far: asked, answered, train_loss, bytes_up, bytes_down."""
        return dict(self._tally)

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
                at = Crossing(stream(self.seed, "download", self._round), model)
                payload, _ = filter_.encode(payload, filter_.init(), at)
            version = self._sent.version + 1 if self._sent else 0
            self._sent = _Sent(version, model, payload, codec.size(payload), expected(self.job, model))
        return self._sent

    def _count(self, task: Task, updates: Sequence[Update]) -> None:
        """Note what answers say and what they cost."""
        sent, silent, tally = self._out[task.id], self._silent[task.id], self._tally
        for update in updates:
            site, asked = update.site, silent.pop(update.site)
            # A site fetches a given model once; what the server does at home crosses nothing.
            bytes_down = 0 if self._held.get(site) == sent.version else sent.size
            self._held[site] = sent.version
            if site != SERVER:
                tally["bytes_up"] += update.bytes
                tally["bytes_down"] += bytes_down
            if update.kind != "weight_diff":
                continue
            values: dict[str, Any] = {f"train_{key}": value for key, value in update.metrics.items()}
            values["train_samples"], values["seconds"] = update.weight, update.seconds
            values["bytes_up"], values["bytes_down"] = update.bytes, bytes_down
            self._tracker.emit("result", task.round, site, values)
            if self._known.wanted:
                seconds = update.seconds
                if getattr(self._transport, "clock", None) is not None:
                    seconds = cast(Any, self._transport).moment(task, site) - asked
                loss = update.metrics.get("loss", math.nan)
                self._known.note(site, samples=update.weight, loss=loss, seconds=seconds)

    def _evaluate(self, model: Arrays) -> dict[str, float]:
        """The model's metrics over all held-out samples, and each evaluator's own in the table."""
        per_metric: dict[str, list[tuple[float, float]]] = {}
        own: dict[str, float] = {}
        answers = self._answers([self.broadcast("evaluate", model, to=self.evaluators)])
        for update in (update for one in answers for update in one.updates):
            self._tracker.emit("metric", self._round, update.site, {**update.metrics, "samples": update.weight})
            if update.site == SERVER:
                own = dict(update.metrics)
            for name, value in update.metrics.items():
                per_metric.setdefault(name, []).append((value, update.weight))
        return own or {name: _mean(pairs) for name, pairs in per_metric.items()}


def _mean(pairs: Sequence[tuple[float, float]]) -> float:
    """The weighted mean of (value, weight) pairs, without those whose value is not a number."""
    counted = [(value, weight) for value, weight in pairs if not math.isnan(value)]
    total = sum(weight for _, weight in counted)
    return sum(value * weight for value, weight in counted) / total if total else math.nan


def _short(
    round: int, what: str, answered: int, asked: int, quorum: int, failures: Mapping[str, Failure]
) -> QuorumNotReached:
    """Say who failed and why, the most frequent reason first."""
    where = f"round {round}: " if round else ""
    message = f"{where}{answered} of {asked} sites answered {what}, {quorum} are needed"
    for reason, count in Counter(failure.reason for failure in failures.values()).most_common(3):
        who = [site for site, failure in failures.items() if failure.reason == reason]
        shown = ", ".join(f"'{site}'" for site in who[:3]) + (" …" if count > 3 else "")
        message += f"\n  {count} failed ({shown}): {reason}"
    return QuorumNotReached(message, next((f.traceback for f in failures.values() if f.traceback), ""))
