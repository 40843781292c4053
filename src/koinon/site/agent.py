"""The loop at a site: take a task, let the executor answer it, pass the answer through the filters."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from koinon.errors import in_a_line
from koinon.filters import NOTHING, Filter
from koinon.payload import Arrays, Payload, tree
from koinon.site.runner import Runner
from koinon.streams import number, stream
from koinon.task import Failure, Job, Result, Task

State: TypeAlias = dict[str, Any]
"""What a site remembers between tasks: `filter`, the upload filter's state, and `kept`, arrays that never leave."""


@dataclass(frozen=True)
class SiteContext:
    """What an executor is told besides the payload (koinon.task.Context)."""

    task: str
    site: str
    round: int
    data: Any
    seed: int

    def stream(self, purpose: str) -> np.random.Generator:
        """A random stream of this site, round and purpose."""
        return stream(self.seed, purpose, self.round, self.site)

    def number(self, purpose: str) -> int:
        """An integer of 63 bits from the same key, to seed a library with."""
        return number(self.seed, purpose, self.round, self.site)


@dataclass(frozen=True)
class Agent:
    """One site at work.

    Args:
        site: its name.
        data: what it holds: `.train` and `.test`.
        job: whose filters stand between the site and the server.
        runner: where executors run.
        seed: the run's.
    """

    site: str
    data: Any
    job: Job
    runner: Runner
    seed: int

    def work(self, task: Task, state: State) -> tuple[Result, State]:
        """Answer a task.  Whatever the executor raises becomes a failure with its traceback."""
        began = time.perf_counter()
        try:
            context = SiteContext(task.name, self.site, task.round, self.data, self.seed)
            kept = state.get("kept", {})
            received = self.job.download.decode(task.payload)
            # Whoever trains in place would be taken for one who learned nothing.
            model = tree.read_only({**received.arrays, **kept})
            answer = self.runner.run(task.name, replace(received, arrays=model), context)
            payload, state = self.leave(answer, model, context, state)
        except Exception as error:
            return Result(task.id, self.site, failure=_failure(error), seconds=time.perf_counter() - began), state
        return Result(task.id, self.site, payload, seconds=time.perf_counter() - began), state

    def leave(self, answer: Payload, model: Arrays, context: SiteContext, state: State) -> tuple[Payload, State]:
        """What goes out of an executor's answer, through the filters, and what the site remembers."""
        if answer.kind not in ("weights", "weight_diff"):
            return answer, state
        update, upload = _update(answer, model), self.job.upload
        if upload is NOTHING:
            return update, {}
        update, kept = _parted(update, model, upload)
        filter_state = state["filter"] if "filter" in state else upload.init()
        update, filter_state = upload.encode(update, filter_state, context.stream("upload"))
        after = {"filter": filter_state} if filter_state is not None else {}
        return update, after | ({"kept": kept} if kept else {})


def work_together(agents: Sequence[Agent], task: Task, states: Sequence[State]) -> list[tuple[Result, State]]:
    """Let several sites answer at once, where their executor can and they start from the same model.

    If anything of that fails, each works alone, so that the one who is to blame is named.
    """
    if not any("kept" in state for state in states):
        with contextlib.suppress(Exception):
            return _as_cohort(agents, task, states)
    return [agent.work(task, state) for agent, state in zip(agents, states, strict=True)]


def _as_cohort(agents: Sequence[Agent], task: Task, states: Sequence[State]) -> list[tuple[Result, State]]:
    began, job = time.perf_counter(), agents[0].job
    received = job.download.decode(task.payload)
    contexts = [SiteContext(task.name, agent.site, task.round, agent.data, agent.seed) for agent in agents]
    answers = agents[0].runner.run_cohort(task.name, received, contexts)
    each = (time.perf_counter() - began) / len(agents)
    done = []
    for agent, context, answer, state in zip(agents, contexts, answers, states, strict=True):
        if job.upload is not NOTHING:
            # The next cohort overwrites these arrays, and a filter may remember them.
            answer = replace(answer, arrays=tree.map(np.copy, answer.arrays))
        payload, after = agent.leave(answer, received.arrays, context, state)
        done.append((Result(task.id, agent.site, payload, seconds=each), after))
    return done


def _update(answer: Payload, model: Arrays) -> Payload:
    """An answer as a change of the model.  Only floating arrays are sent: a mean of counters means nothing."""
    update = tree.floating(answer.arrays)
    if answer.kind == "weights":
        for name, array in update.items():
            # What the model has not, or has in another shape, goes up as it is, to be refused by name.
            if name in model and array.shape == model[name].shape:
                update[name] = array - model[name]
    return Payload("weight_diff", update, answer.values)


def _parted(update: Payload, model: Arrays, upload: Filter) -> tuple[Payload, dict[str, np.ndarray]]:
    """What leaves of an update, and the site's own arrays that stay."""
    names = upload.keeps(frozenset(update.arrays))
    leaving = {name: array for name, array in update.arrays.items() if name not in names}
    return replace(update, arrays=leaving), {name: model[name] + update.arrays[name] for name in names}


def _failure(error: Exception) -> Failure:
    """One line and the traceback."""
    return Failure(in_a_line(error), "".join(traceback.format_exception(error)))
