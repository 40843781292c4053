"""How it travels within one process: the call itself.  Arrays cross as read-only views, never as copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from koinon.payload import tree
from koinon.site import Agent, Runner, State, work_together
from koinon.task import Board, Job, Task


class Local:
    """Lets one site after the other answer, or cohorts of them, on the caller's thread.

    Args:
        job: what runs.
        data: what a site holds, asked for when its turn comes.
        runner: where executors run.
        seed: the run's.
        states: what the sites remember from before (after a resume).
    """

    now = staticmethod(time.monotonic)

    def __init__(
        self, job: Job, data: Callable[[str], Any], *, runner: Runner, seed: int, states: Mapping[str, State]
    ) -> None:
        self._job, self._data, self._runner, self._seed = job, data, runner, seed
        self.states = dict(states)
        self._shown: tuple[Task, Task] | None = None

    def wait(self, board: Board, task: Task) -> None:
        """Let the next site that waits for this task do its work, or the next cohort of them."""
        sites = board.next_waiting(task.id, self._runner.cohorts.get(task.name, 1))
        leased = [board.pull(site, self.now()) for site in sites]
        if len(sites) > 1 and all(one is task for one in leased):
            self._work(board, task, sites)
            return
        for site, one in zip(sites, leased, strict=True):
            if one is not None:  # its deadline may have passed; or an older task comes first
                self._work(board, one, [site])

    def _work(self, board: Board, task: Task, sites: Sequence[str]) -> None:
        shown, states = self._read_only(task), [self.states.get(site, {}) for site in sites]
        agents = [Agent(site, self._data(site), self._job, self._runner, self._seed) for site in sites]
        done = [agents[0].work(shown, states[0])] if len(sites) == 1 else work_together(agents, shown, states)
        for result, state in done:
            if state:
                self.states[result.site] = state  # most sites remember nothing, and cost nothing
            board.answer(result, self.now())

    def _read_only(self, task: Task) -> Task:
        """The task with arrays that refuse to be written; made once for all its sites."""
        if self._shown is None or self._shown[0] is not task:
            payload = replace(task.payload, arrays=tree.read_only(task.payload.arrays))
            self._shown = (task, replace(task, payload=payload))
        return self._shown[1]
