"""The errands of a site: what it was asked, what it works on, what it has done and could not deliver yet.

The other end of the board, with the same two rules: no I/O and no clock, and whatever arrives from outside changes
nothing unless it is accepted.  The site's daemon does what `next` says, one step of a job at a time, and tells what
became of it.  An errand goes through these states:

    asked ──begin──► working ──done──► spooled ──acknowledged──► gone
      ▲                 │
      └──── died ───────┘ (three times at most)

The next one of a job begins when the last was acknowledged, since what a site remembers counts only from then on.
Dropped or ended, an errand is discarded from any state; while it is worked on, `stops` says so first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias
from urllib.parse import quote

import msgspec

from koinon.errors import Refused
from koinon.task.wire import Assignment, Orders

DEATHS = 3
"""How often a task may take its process along before it is given up."""

KEPT = ("accepted", "duplicate")
"""Verdicts with which what a site learned in a task counts."""

JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
DIGEST = re.compile(r"[0-9a-f]{64}")
NAME = 200
"""Characters of a task's id as a file's name, at most."""


class Answer(msgspec.Struct, frozen=True):
    """An answer in the spool.

    Args:
        job: the job's id.
        task: the task's.
        asked: SHA-256 of the payload that it answers.
        digest: SHA-256 of its own bytes; `size` of them.
        seconds: that the work took.
        failed: whether it says why there is no result.
    """

    job: str
    task: str
    asked: str
    digest: str
    size: int
    seconds: float
    failed: bool


@dataclass(frozen=True)
class Work:
    """Begin a task; or answer it with a failure, for the reason in `refused`."""

    asked: Assignment
    refused: str = ""


@dataclass(frozen=True)
class Deliver:
    """Bring an answer to the server."""

    answer: Answer


@dataclass(frozen=True)
class Discard:
    """Delete what the spool holds of a task that nobody waits for."""

    task: str


@dataclass(frozen=True)
class Forget:
    """Delete all there is of a job that is over."""


Step: TypeAlias = Work | Deliver | Discard | Forget


@dataclass
class _Errand:
    task: str
    digest: str  # of the payload
    asked: Assignment | None = None  # None of what is known from the spool
    answer: Answer | None = None
    working: bool = False
    dropped: bool = False
    deaths: int = 0


@dataclass
class _Job:
    errands: list[_Errand] = field(default_factory=list)
    ended: bool = False

    def live(self, task: str) -> _Errand | None:
        """What is to be done of this task; what was dropped does not count."""
        return next((one for one in self.errands if one.task == task and not one.dropped), None)

    @property
    def working(self) -> _Errand | None:
        """What is being worked on."""
        return next((one for one in self.errands if one.working), None)


class Errands:
    """What one site has to do, in all its jobs.

    Args:
        spooled: the answers that a restarted site finds.
        jobs: of which it keeps anything.
        over: jobs that have ended here, and are not taken up again.
    """

    def __init__(self, spooled: Iterable[Answer] = (), jobs: Iterable[str] = (), over: Iterable[str] = ()) -> None:
        self._jobs: dict[str, _Job] = {job: _Job() for job in jobs}
        self.over = set(over)
        for answer in spooled:
            errand = _Errand(answer.task, answer.asked, answer=answer)
            self._jobs.setdefault(answer.job, _Job()).errands.append(errand)

    # -- what happened ---------------------------------------------------------------------------------------

    def hear(self, orders: Orders) -> bool:
        """Take the server's orders, all or none; what is held already is not begun again.

        Returns:
            Whether they said anything new.

        Raises:
            Refused: they name something that cannot be.
        """
        for one in orders.assignments:
            _check(one)
        named = [(name, task) for name, tasks in orders.dropped.items() for task in tasks]
        dropped = [held for name, task in named if name in self._jobs and (held := self._jobs[name].live(task))]
        ended = [at for name in orders.ended if (at := self._jobs.get(name)) and not at.ended]
        for errand in (*dropped, *(one for at in ended for one in at.errands)):
            errand.dropped = True
        for at in ended:
            at.ended = True
        added = [self._add(one) for one in orders.assignments]
        return bool(dropped) or bool(ended) or any(added)

    def begin(self, job: str, task: str) -> None:
        """A task is being worked on."""
        for errand in self._jobs[job].errands:
            errand.working = errand.task == task and not errand.dropped

    def died(self, job: str, task: str) -> bool:
        """The process that worked on a task is gone; True: once too often, and the task is to be given up."""
        errand = self._begun(job, task)
        errand.working = False
        errand.deaths += 1
        return not errand.dropped and errand.deaths >= DEATHS

    def postpone(self, job: str) -> None:
        """Nothing is being worked on after all: something else has to come first, such as room on the disk."""
        for errand in self._jobs[job].errands if job in self._jobs else ():
            errand.working = False

    def done(self, answer: Answer) -> None:
        """The answer to a task is in the spool; or another in its place, if it was there before."""
        errand = self._held(answer)
        errand.answer, errand.working = answer, False

    def acknowledged(self, answer: Answer) -> None:
        """The server has said what became of an answer, and the site has drawn the consequences (see KEPT)."""
        self._jobs[answer.job].errands.remove(self._held(answer))

    def discarded(self, job: str, task: str) -> None:
        """Nothing is left of a dropped task."""
        errands = self._jobs[job].errands
        errands.remove(next(one for one in errands if one.task == task and one.dropped and not one.working))

    def forgotten(self, job: str) -> None:
        """Nothing is left of a job that is over."""
        errands = [one for one in self._jobs.pop(job).errands if not one.dropped]
        self.over.add(job)
        if errands:  # asked anew meanwhile
            self._jobs[job] = _Job(errands)

    # -- what is to be done ----------------------------------------------------------------------------------

    def next(self, job: str, *, room: bool = True) -> Step | None:
        """The next step in a job; None: there is none before something else happens.

        Args:
            job: its id.
            room: whether the disk allows to take on work.
        """
        at = self._jobs.get(job)
        if at is None or at.working:
            return None
        if at.ended:
            return Forget()
        for errand in at.errands:
            if errand.dropped:
                return Discard(errand.task)
        for errand in at.errands:
            if errand.answer:
                return Deliver(errand.answer)
        for errand in at.errands:
            if errand.asked and (room or job in self.over):
                ended = f"the job '{job}' has ended at this site before: submit it anew"
                return Work(errand.asked, ended if job in self.over else "")
        return None

    def stops(self, job: str) -> bool:
        """Whether nobody waits any more for what is being worked on in a job."""
        at = self._jobs.get(job)
        return at is not None and at.working is not None and at.working.dropped

    @property
    def holding(self) -> dict[str, list[str]]:
        """What a poll says: the tasks that wait here, are worked on, or could not be delivered yet."""
        held = {name: [one.task for one in job.errands if not one.dropped] for name, job in self._jobs.items()}
        return {name: tasks for name, tasks in held.items() if tasks}

    @property
    def jobs(self) -> list[str]:
        """What a poll says: all jobs of which there is anything, and that are not known to be over."""
        return [name for name, job in self._jobs.items() if not job.ended]

    @property
    def all_jobs(self) -> Collection[str]:
        """All jobs of which there is anything."""
        return self._jobs.keys()

    def payloads(self, job: str) -> set[str]:
        """The digests of what is still to be worked on in a job."""
        return {one.digest for one in self._jobs[job].errands if one.answer is None and not one.dropped}

    # -- inside ----------------------------------------------------------------------------------------------

    def _add(self, asked: Assignment) -> bool:
        job = self._jobs.setdefault(asked.job, _Job())
        if held := job.live(asked.task):
            if held.digest == asked.digest:
                return False
            held.dropped = True  # the server was restarted, and asks the same of another model
        job.errands.append(_Errand(asked.task, asked.digest, asked))
        return True

    def _begun(self, job: str, task: str) -> _Errand:
        return next(one for one in self._jobs[job].errands if one.task == task and one.working)

    def _held(self, answer: Answer) -> _Errand:
        errands = self._jobs[answer.job].errands
        return next(one for one in errands if one.task == answer.task and one.digest == answer.asked)


def file_name(task: str) -> str:
    """A task's id as the name of a file, and in an address."""
    return quote(task, safe="")


def _check(asked: Assignment) -> None:
    """Raises Refused for what would become a file outside its folder, or can never be right."""
    digests = DIGEST.fullmatch(asked.digest) and DIGEST.fullmatch(asked.bundle)
    if not JOB.fullmatch(asked.job) or not 0 < len(file_name(asked.task)) <= NAME or not digests:
        raise Refused(f"the server assigns what cannot be, job {asked.job!r}, task {asked.task!r}: ask its operator")
    if asked.size < 0 or asked.bundle_size < 0:
        raise Refused(f"the server announces {asked.size} and {asked.bundle_size} bytes for task {asked.task!r}")


@dataclass
class Backoff:
    """How long to wait before the next try: anything up to a bound that doubles (full jitter, Brooker 2015).

    Args:
        first: the bound after the first failure, in seconds.
        most: the bound after many.
    """

    first: float = 0.2
    most: float = 30.0
    tries: int = 0

    def wait(self, draw: float) -> float:
        """Seconds to wait after a failure; `draw` is uniform in [0, 1)."""
        bound = min(self.most, self.first * 2.0 ** min(self.tries, 60))
        self.tries += 1
        return draw * bound

    def reset(self) -> None:
        """It went well."""
        self.tries = 0
