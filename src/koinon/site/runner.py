"""Where an executor runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from koinon.errors import JobError
from koinon.payload import Payload
from koinon.task import Context, Job, Worker


class Runner(Protocol):
    """Runs the executor that answers a task."""

    @property
    def cohorts(self) -> Mapping[str, int]:
        """Tasks that are answered for several sites at once, and for how many."""

    def run(self, task: str, payload: Payload, context: Context) -> Payload:
        """The executor's answer; what it raises is raised."""

    def run_cohort(self, task: str, payload: Payload, contexts: Sequence[Context]) -> list[Payload]:
        """The answers of several sites that start from the same payload.  Their arrays last until the next call."""


class Inline:
    """In this process, on the caller's thread.  Each executor is opened once, however many sites it serves."""

    def __init__(self, job: Job) -> None:
        self._workers: dict[str, Worker] = {}
        self.cohorts: dict[str, int] = {}
        self.forms: dict[str, str] = {}
        for executor in job.executors:
            worker = executor.open()
            self._workers |= dict.fromkeys(executor.tasks, worker)
            self.cohorts |= getattr(worker, "cohorts", {})
            self.forms |= getattr(worker, "forms", {})

    def run(self, task: str, payload: Payload, context: Context) -> Payload:
        """The executor's answer."""
        if task not in self._workers:
            raise JobError(f"no executor of this job answers the task '{task}'")
        return self._workers[task](payload, context)

    def run_cohort(self, task: str, payload: Payload, contexts: Sequence[Context]) -> list[Payload]:
        """The answers of several sites, from one tensor program."""
        answers: list[Payload] = self._workers[task].together(payload, contexts)  # type: ignore[attr-defined]
        return answers
