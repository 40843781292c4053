"""How it travels within one process: the call itself.  Arrays cross as read-only views, never as copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from koinon.payload import tree
from koinon.site import Agent, Runner, State
from koinon.task import Board, Job, Task


class Local:
    """Lets one site after the other answer, on the caller's thread.

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

    def wait(self, board: Board, task: str) -> None:
        """Let the next site that waits for this task do its work."""
        site = board.next_waiting(task)
        leased = board.pull(site, self.now()) if site is not None else None
        if site is None or leased is None:
            return
        agent = Agent(site, self._data(site), self._job, self._runner, self._seed)
        result, state = agent.work(self._read_only(leased), self.states.get(site, {}))
        if state:
            self.states[site] = state  # most sites remember nothing, and cost nothing
        board.answer(result, self.now())

    def _read_only(self, task: Task) -> Task:
        """The task with arrays that refuse to be written; made once for all its sites."""
        if self._shown is None or self._shown[0] is not task:
            payload = replace(task.payload, arrays=tree.read_only(task.payload.arrays))
            self._shown = (task, replace(task, payload=payload))
        return self._shown[1]
