"""The board: which site was asked what, by when, and with which answer.

Two rules of this file.  It does no I/O and has no clock: every call that depends on time is given `now`, in
seconds.  And whatever arrives from outside changes nothing unless it is accepted.

A site goes through these states within one task:

    waiting ──pull──► working ──answer──► answered ──refuse──► failed
       ▲                 │
       └──lease is over──┘ (and the task is offered again)

A task is over when nobody waits or works, when enough have answered, when its deadline has passed, or when its
quorum can no longer be reached.  After `close` every answer to it is late.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from koinon.errors import JobError
from koinon.task.task import Failure, Result, Task

if TYPE_CHECKING:
    from koinon.task.answers import Answers

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
    arrived: deque[Result | Answers] = field(default_factory=deque)

    def expire(self, now: float) -> None:
        """Offer again what a silent site holds."""
        for site in [site for site, until in self.working.items() if until <= now]:
            del self.working[site]
            self.waiting[site] = None


class Board:
    """The open tasks of one job: `tasks`, by id, the oldest first.

    Args:
        lease: seconds a site may hold a task without a sign of life before it is offered again.
    """

    def __init__(self, lease: float = math.inf) -> None:
        self.lease = lease
        self.tasks: dict[str, Task] = {}
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
        self.tasks[task.id] = task
        self._open[task.id] = _Open(task, waiting)

    def pull(self, site: str, now: float, held: Collection[str] = ()) -> Task | None:
        """The oldest task that this site should work on, now leased to it; None if there is nothing to do.

        A site that pulls again before it answered has lost the task (it may have been restarted) and gets
        the same one, unless it says that it still holds it.
        """
        for open_task in self._open.values():
            task = open_task.task
            if task.id in held:
                continue
            if self.lease != math.inf:
                open_task.expire(now)
            if task.deadline is not None and now >= task.deadline:
                continue
            if site in open_task.waiting or site in open_task.working:
                open_task.waiting.pop(site, None)
                open_task.working[site] = now + self.lease
                return task
        return None

    def touch(self, site: str, task: str, now: float) -> bool:
        """A sign of life: the lease runs anew.  False tells the site to stop: nobody waits for its answer."""
        open_task = self._open.get(task)
        if open_task is None or site not in open_task.working:
            return False
        open_task.working[site] = now + self.lease
        return True

    def answer(self, answer: Result | Answers, now: float) -> Verdict:
        """Take a site's answer, or those of several at once, at most once and as a whole.

        An answer counts even after its lease was over, as long as the task is open and before its deadline.
        """
        if answer.task in self._closed:
            return "late"
        open_task = self._open.get(answer.task)
        if open_task is None:
            return "unknown"
        if isinstance(answer, Result) and (answer.payload is None) == (answer.failure is None):
            return "malformed"
        sites = answer.sites
        if any(site in open_task.answered or site in open_task.failed for site in sites):
            return "duplicate"
        if any(site not in open_task.waiting and site not in open_task.working for site in sites):
            return "unknown"
        deadline = open_task.task.deadline
        if deadline is not None and now >= deadline:
            return "late"
        for site in sites:
            open_task.waiting.pop(site, None)
            open_task.working.pop(site, None)
        open_task.failed |= answer.failures
        if arrived := [site for site in sites if site not in answer.failures]:
            open_task.answered.update(arrived)
            open_task.arrived.append(answer)
        return "accepted"

    def refuse(self, task: str, site: str, reason: str) -> None:
        """Count an accepted answer as failed: its content turned out to be of no use."""
        open_task = self._open[task]
        open_task.answered.discard(site)
        open_task.failed[site] = Failure(reason)

    def take(self, task: str) -> Result | Answers | None:
        """The next accepted answer that nobody has taken yet, in the order of arrival."""
        arrived = self._open[task].arrived
        return arrived.popleft() if arrived else None

    def progress(self, task: str, now: float) -> Progress:
        """How far an open task is."""
        open_task = self._open[task]
        asked, answered, failed = len(open_task.task.sites), len(open_task.answered), len(open_task.failed)
        deadline, quorum, enough = open_task.task.deadline, open_task.task.quorum, open_task.task.enough
        over = (
            answered + failed == asked
            or (enough is not None and answered >= enough)
            or (deadline is not None and now >= deadline)
            or asked - failed < quorum  # it cannot be reached any more
        )
        return Progress(asked, answered, failed, over)

    def close(self, task: str) -> dict[str, Failure]:
        """End a task: from now on every answer to it is late.

        Returns:
            Who failed, and why, in the order in which it was learned.
        """
        self._closed.add(task)
        del self.tasks[task]
        return self._open.pop(task).failed
