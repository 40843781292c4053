"""The board: which site was asked what, by when, and with which answer.

Two rules of this file.  It does no I/O and has no clock: every call that depends on time is given `now`, in
seconds.  And whatever arrives from outside changes nothing unless it is accepted.

A site goes through these states within one task:

    waiting ──pull──► working ──answer──► answered ──refuse──► failed
       ▲                 │
       └──lease is over──┘ (and the task is offered again)

A task is over when nobody waits or works, when its deadline has passed, or when its quorum can no longer be
reached.  After `close` every answer to it is late.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from koinon.errors import JobError
from koinon.task.task import Failure, Result, Task

Verdict: TypeAlias = Literal["accepted", "duplicate", "late", "unknown", "malformed"]
"""What becomes of an answer; all but the first leave the board as it was."""


@dataclass(frozen=True)
class Progress:
    """How far a task is: numbers of sites, and whether it is over."""

    asked: int
    answered: int
    failed: int
    over: bool

    @property
    def pending(self) -> int:
        """Sites that may still answer."""
        return self.asked - self.answered - self.failed


@dataclass
class _Open:
    """An open task and where each of its sites stands."""

    task: Task
    waiting: dict[str, None]
    working: dict[str, float] = field(default_factory=dict)  # until when each lease lasts
    answered: set[str] = field(default_factory=set)
    failed: dict[str, Failure] = field(default_factory=dict)
    arrived: deque[Result] = field(default_factory=deque)

    def expire(self, now: float) -> None:
        """Offer again what a silent site holds."""
        for site in [site for site, until in self.working.items() if until <= now]:
            del self.working[site]
            self.waiting[site] = None


class Board:
    """The open tasks of one job."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}
        self._closed: set[str] = set()

    def post(self, task: Task) -> None:
        """Offer a task to its sites.

        Raises:
            JobError: the id was used before, a site is named twice, or the quorum cannot be reached.
        """
        if task.id in self._open or task.id in self._closed:
            raise JobError(f"task '{task.id}' was posted before")
        waiting = dict.fromkeys(task.sites)
        if len(waiting) != len(task.sites):
            raise JobError(f"task '{task.id}' names a site twice")
        if not 1 <= task.quorum <= len(waiting):
            raise JobError(f"task '{task.id}' asks {len(waiting)} sites for a quorum of {task.quorum}")
        self._open[task.id] = _Open(task, waiting)

    def pull(self, site: str, now: float) -> Task | None:
        """The oldest task that this site should work on, now leased to it; None if there is nothing to do.

        A site that pulls again before it answered has lost the task (it may have been restarted) and gets
        the same one.
        """
        for open_task in self._open.values():
            task = open_task.task
            if task.lease != float("inf"):
                open_task.expire(now)
            if task.deadline is not None and now >= task.deadline:
                continue
            if site in open_task.waiting or site in open_task.working:
                open_task.waiting.pop(site, None)
                open_task.working[site] = now + task.lease
                return task
        return None

    def touch(self, site: str, task: str, now: float) -> bool:
        """A sign of life: the lease runs anew.  False tells the site to stop: nobody waits for its answer."""
        open_task = self._open.get(task)
        if open_task is None or site not in open_task.working:
            return False
        open_task.working[site] = now + open_task.task.lease
        return True

    def answer(self, result: Result, now: float) -> Verdict:
        """Take a site's answer, at most once.

        An answer counts even after its lease was over, as long as the task is open and before its deadline.
        """
        if result.task in self._closed:
            return "late"
        open_task = self._open.get(result.task)
        if open_task is None:
            return "unknown"
        if (result.payload is None) == (result.failure is None):
            return "malformed"
        if result.site in open_task.answered or result.site in open_task.failed:
            return "duplicate"
        if result.site not in open_task.waiting and result.site not in open_task.working:
            return "unknown"
        deadline = open_task.task.deadline
        if deadline is not None and now >= deadline:
            return "late"
        open_task.waiting.pop(result.site, None)
        open_task.working.pop(result.site, None)
        if result.failure is not None:
            open_task.failed[result.site] = result.failure
        else:
            open_task.answered.add(result.site)
            open_task.arrived.append(result)
        return "accepted"

    def refuse(self, task: str, site: str, reason: str) -> None:
        """Count an accepted answer as failed: its content turned out to be of no use."""
        open_task = self._open[task]
        open_task.answered.discard(site)
        open_task.failed[site] = Failure(reason)

    def take(self, task: str) -> Result | None:
        """The next accepted answer that nobody has taken yet, in the order of arrival."""
        arrived = self._open[task].arrived
        return arrived.popleft() if arrived else None

    def progress(self, task: str, now: float) -> Progress:
        """How far an open task is."""
        open_task = self._open[task]
        asked, answered, failed = len(open_task.task.sites), len(open_task.answered), len(open_task.failed)
        deadline, quorum = open_task.task.deadline, open_task.task.quorum
        over = (
            answered + failed == asked
            or (deadline is not None and now >= deadline)
            or asked - failed < quorum  # it cannot be reached any more
        )
        return Progress(asked, answered, failed, over)

    def next_waiting(self, task: str, count: int = 1) -> list[str]:
        """The first `count` sites that have not fetched an open task yet, in the order in which they were asked."""
        return list(itertools.islice(self._open[task].waiting, count))

    def close(self, task: str) -> dict[str, Failure]:
        """End a task: from now on every answer to it is late.

        Returns:
            Who failed, and why, in the order in which it was learned.
        """
        self._closed.add(task)
        return self._open.pop(task).failed
