"""Where an executor runs: a worker is an opened executor, and an agent does not care where it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from koinon.task import Job, Worker


def inline(job: Job, *, threads: int | None = None) -> dict[str, Worker]:
    """What answers each task, in this process and on the caller's thread.

    Each executor is opened once, however many tasks and sites it serves.

    Args:
        job: whose executors run.
        threads: of a step of training, where the executor's library lets itself be told; by default its own choice.
    """
    workers: dict[str, Worker] = {}
    for executor in job.executors:
        worker = executor.open()
        if threads is not None and hasattr(worker, "threads"):
            worker.threads = threads
        workers |= dict.fromkeys(executor.tasks, worker)
    return workers


def settled(job: Job, workers: Mapping[str, Worker], data: Any, *, before: Mapping[str, str] | None = None) -> Job:
    """The job with every choice made that its workers would make by a measurement, so that all make the same.

    Args:
        job: whose executors may be trained in several forms.
        workers: its own, opened here; they take the form that is chosen.
        data: a site's training data, to measure with.
        before: what `forms` said when the run began: no measurement changes the form of a run that goes on.
    """
    executors = []
    for executor in job.executors:
        worker: Any = workers[next(iter(executor.tasks))]
        if hasattr(worker, "probe"):
            form = next((said.partition(":")[0] for task, said in (before or {}).items() if task in executor.tasks), "")
            executor = dataclasses.replace(cast(Any, executor), form=worker.probe(data, form))
        executors.append(executor)
    return job.replace(executors=executors)


def in_loops(job: Job) -> Job:
    """The job with every executor that may choose its form in the one of single sites."""
    chosen = [
        dataclasses.replace(cast(Any, executor), form="loop") if getattr(executor, "form", "") == "auto" else executor
        for executor in job.executors
    ]
    return job.replace(executors=chosen)


def forms(workers: Mapping[str, Worker]) -> dict[str, str]:
    """How each task is worked off, and why so, as far as its worker says it: for a run's record."""
    said = [getattr(worker, "forms", {}) for worker in workers.values()]
    return {task: form for one in said for task, form in one.items()}
