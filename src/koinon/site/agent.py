"""The loop at a site: take a task, let the executor answer it, pass the answer through the filters."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from koinon.errors import KoinonError
from koinon.filters import Filter
from koinon.payload import Arrays, Payload, tree
from koinon.site.runner import Runner
from koinon.streams import number, stream
from koinon.task import Failure, Result, Task

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
        runner: where executors run.
        upload: the filter on what leaves the site.
        download: the filter on what comes in.
        seed: the run's.
    """

    site: str
    data: Any
    runner: Runner
    upload: Filter
    download: Filter
    seed: int

    def work(self, task: Task, state: State) -> tuple[Result, State]:
        """Answer a task.  Whatever the executor raises becomes a failure with its traceback."""
        began = time.perf_counter()
        try:
            payload, state = self._answer(task, state)
        except Exception as error:
            return Result(task.id, self.site, failure=_failure(error), seconds=time.perf_counter() - began), state
        return Result(task.id, self.site, payload, seconds=time.perf_counter() - began), state

    def _answer(self, task: Task, state: State) -> tuple[Payload, State]:
        context = SiteContext(task.name, self.site, task.round, self.data, self.seed)
        received = self.download.decode(task.payload)
        kept = state.get("kept", {})
        model = {**received.arrays, **kept} if kept else received.arrays
        answer = self.runner.run(task.name, received.with_arrays(model), context)
        if answer.kind not in ("weights", "weight_diff"):
            return answer, state
        update, kept = _leaving(answer, model, self.upload)
        filter_state = state["filter"] if "filter" in state else self.upload.init()
        update, filter_state = self.upload.encode(update, filter_state, context.stream("upload"))
        after = {"filter": filter_state} if filter_state else {}
        return update, after | ({"kept": kept} if kept else {})


def _leaving(answer: Payload, model: Arrays, upload: Filter) -> tuple[Payload, dict[str, np.ndarray]]:
    """An answer as the change that leaves the site, and the arrays that stay.

    Only floating arrays are sent: a mean of counters means nothing.
    """
    arrays = tree.floating(answer.arrays)
    if answer.kind == "weights":
        known = {name: array for name, array in arrays.items() if name in model and array.shape == model[name].shape}
        # What the model has not, or has in another shape, goes up as it is, to be refused by name.
        update = arrays | {name: array - model[name] for name, array in known.items()}
    else:
        update = arrays
    names = upload.keeps(frozenset(update))
    kept = {name: np.array(model[name] + update[name]) for name in names}
    leaving = {name: array for name, array in update.items() if name not in names} if names else update
    return Payload("weight_diff", leaving, answer.values), kept


def _failure(error: Exception) -> Failure:
    """One line and the traceback: Koinon's own errors say enough without their class."""
    reason = str(error) if isinstance(error, KoinonError) else f"{type(error).__name__}: {error}"
    return Failure(reason, "".join(traceback.format_exception(error)))

