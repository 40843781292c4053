"""Where an executor runs."""

from __future__ import annotations

from typing import Protocol

from koinon.errors import JobError
from koinon.payload import Payload
from koinon.task import Context, Job, Worker


class Runner(Protocol):
    """Runs the executor that answers a task."""

    def run(self, task: str, payload: Payload, context: Context) -> Payload:
        """The executor's answer; what it raises is raised."""


class Inline:
    """In this process, one task after the other.  Each executor is opened once, however many sites it serves."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._workers: dict[str, Worker] = {}

    def run(self, task: str, payload: Payload, context: Context) -> Payload:
        """The executor's answer, on this thread."""
        if task not in self._workers:
            self._open(task)
        return self._workers[task](payload, context)

    def _open(self, task: str) -> None:
        if task not in self._job.answers:
            raise JobError(f"no executor of this job answers the task '{task}'")
        executor = self._job.answers[task]
        self._workers |= dict.fromkeys(executor.tasks, executor.open())
