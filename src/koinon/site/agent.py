"""The loop at a site: take a task, let the executor answer it, pass the answer through the filters.

One agent serves one site of a real federation, or any number of virtual ones.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from koinon.aggregate import Aggregator
from koinon.errors import JobError, in_a_line, out_of_memory
from koinon.filters import NOTHING, Crossing
from koinon.payload import Arrays, Payload, tree
from koinon.task import Answers, Context, Failure, Job, Result, Task, Worker, averaged, checked, expected

State: TypeAlias = dict[str, Any]
"""What a site remembers between tasks: `filter`, the upload filter's state; `kept`, arrays that never leave; and `own`,
what its executor remembers."""

States: TypeAlias = MutableMapping[str, State]
"""What sites remember, by their names."""


@dataclass(frozen=True)
class Agent:
    """Sites at work.

    Args:
        job: whose filters stand between the sites and the server.
        data: what a site holds, by its name: `.train` and `.test`.
        workers: what answers each task: the opened executors, here or in another process (see runner).
        seed: the run's.
    """

    job: Job
    data: Callable[[str], Any]
    workers: Mapping[str, Worker]
    seed: int

    def work(self, task: Task, site: str, states: States, received: Payload | None = None) -> Result:
        """Answer a task for one site, decoded already if it is for several.

        What the site remembers changes only if it succeeds.  Whatever its executor raises becomes a failure with
        its traceback.
        """
        began, state = time.perf_counter(), states.get(site, {})
        try:
            received = received or self._received(task)
            model = received.arrays
            if "kept" in state:
                model = {**model, **tree.read_only(state["kept"])}
            if task.name not in self.workers:
                raise JobError(f"no executor of this job answers the task '{task.name}'")
            own = {**state.get("own", {})}
            context = Context(task.name, site, task.round, self.data(site), self.seed, own)
            # An executor may do what it likes with its own dict, and may not with the arrays.
            answer = self.workers[task.name](Payload(received.kind, {**model}, received.values), context)
            payload, states[site] = self._leave(answer, model, context, state)
        except Exception as error:
            return Result(task.id, site, failure=failed(error), seconds=time.perf_counter() - began)
        return Result(task.id, site, payload, seconds=time.perf_counter() - began)

    def answer(self, task: Task, sites: Sequence[str], states: States, aggregator: Aggregator | None = None) -> Answers:
        """Answer a task for several sites, as the server would read it; folded, if told how.

        They are trained at once where their executor can and they start from the same model.  If anything of that
        fails, each works alone, so that the one who is to blame is named.
        """
        cohorts = getattr(self.workers.get(task.name), "cohorts", {})
        if task.name in cohorts and not any("kept" in state for state in states.values()):
            try:
                return self._at_once(task, sites, states, aggregator)
            except Exception as error:
                many = len(sites) > 1 and out_of_memory(error)
            if many:  # only now has the error let go of what it held
                return self._halved(task, sites, states, aggregator)
        try:
            received = self._received(task)
            like = expected(self.job, received.arrays)
        except Exception as error:
            return Answers(task.id, failures=dict.fromkeys(sites, failed(error)))
        alone = (self.work(task, site, states, received) for site in sites)
        return checked(self.job, alone, task=task.id, like=like, aggregator=aggregator)

    # -- inside ----------------------------------------------------------------------------------------------

    def _received(self, task: Task) -> Payload:
        """The task's payload, decoded.  Whoever trained in place would be taken for one who learned nothing."""
        decoded = self.job.download.decode(replace(task.payload, arrays=tree.read_only(task.payload.arrays)))
        return replace(decoded, arrays=tree.read_only(decoded.arrays))

    def _at_once(self, task: Task, sites: Sequence[str], states: States, aggregator: Aggregator | None) -> Answers:
        """The same from one tensor program; of a plain mean, no site's own update is ever written down."""
        began, received = time.perf_counter(), self._received(task)
        worker: Any = self.workers[task.name]
        like = expected(self.job, received.arrays)
        remembered = [{**states.get(site, {}).get("own", {})} for site in sites]
        contexts = [
            Context(task.name, site, task.round, self.data(site), self.seed, own)
            for site, own in zip(sites, remembered, strict=True)
        ]
        if aggregator and aggregator.needs == "sum" and aggregator.weighted and self.job.upload is NOTHING:
            mean, values = worker.folded(received, contexts)
            if tree.finite(mean.arrays) or tree.mismatch(mean.arrays, like):
                raise ArithmeticError("each must work alone, to tell whose fault it is")
            seconds = (time.perf_counter() - began) / len(sites)
            states.update({context.site: {"own": context.state} for context in contexts if context.state})
            each = dict(zip(sites, values, strict=True))
            return averaged(mean, each, task=task.id, aggregator=aggregator, seconds=seconds)
        after: dict[str, State] = {}
        results = self._together(task, received, contexts, states, after)
        answers = checked(self.job, results, task=task.id, like=like, aggregator=aggregator)
        states.update(after)
        return answers

    def _together(
        self, task: Task, received: Payload, contexts: Sequence[Context], states: States, after: States
    ) -> Iterator[Result]:
        """The results of sites that are trained at once, cohort by cohort; what they remember goes into `after`."""
        worker: Any = self.workers[task.name]
        size = worker.cohorts[task.name]
        for cohort in (contexts[start : start + size] for start in range(0, len(contexts), size)):
            began = time.perf_counter()
            answers = worker.together(received, cohort)
            seconds = (time.perf_counter() - began) / len(cohort)
            for context, answer in zip(cohort, answers, strict=True):
                if self.job.upload is not NOTHING:  # it may remember these arrays, which the next cohort overwrites
                    answer = replace(answer, arrays=tree.map(np.copy, answer.arrays))
                state = states.get(context.site, {})
                payload, after[context.site] = self._leave(answer, received.arrays, context, state)
                yield Result(task.id, context.site, payload, seconds=seconds)

    def _halved(self, task: Task, sites: Sequence[str], states: States, aggregator: Aggregator | None) -> Answers:
        """Where memory does not suffice, half as many at once."""
        middle = len(sites) // 2
        first, second = (self.answer(task, half, states, aggregator) for half in (sites[:middle], sites[middle:]))
        fold = aggregator.merge(first.fold, second.fold) if aggregator and first.fold and second.fold else None
        warning = second.warning or f"out of memory with {len(sites)} sites at once: they go on {middle} at a time"
        updates, failures = [*first.updates, *second.updates], {**first.failures, **second.failures}
        return Answers(task.id, updates, failures, fold, warning)

    def _leave(self, answer: Payload, model: Arrays, context: Context, state: State) -> tuple[Payload, State]:
        """What goes out of an executor's answer, as a change and through the filters; what the site remembers."""
        own: State = {"own": context.state} if context.state else {}
        if answer.kind not in ("weights", "weight_diff"):
            return answer, state | own
        arrays = tree.floating(answer.arrays)  # a mean of counters means nothing
        if answer.kind == "weights":
            for name, array in arrays.items():
                # What the model has not, or has in another shape, goes up as it is, to be refused by name.
                if name in model and array.shape == model[name].shape:
                    arrays[name] = array - model[name]
        update, upload = Payload("weight_diff", arrays, answer.values), self.job.upload
        if upload is NOTHING:
            return update, own
        names = upload.keeps(frozenset(arrays))
        kept = {name: model[name] + arrays[name] for name in names}
        update = replace(update, arrays={name: array for name, array in arrays.items() if name not in names})
        filter_state = state["filter"] if "filter" in state else upload.init()
        update, filter_state = upload.encode(update, filter_state, Crossing(context.stream("upload"), model))
        after = {"filter": filter_state} if filter_state is not None else {}
        return update, own | after | ({"kept": kept} if kept else {})


def failed(error: BaseException) -> Failure:
    """One line and the traceback."""
    reason = in_a_line(error) if isinstance(error, Exception) else f"it called sys.exit({error})"
    return Failure(reason, "".join(traceback.format_exception(error)))
