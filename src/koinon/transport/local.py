"""How it travels within one process: the call itself.  Arrays cross as read-only views, never as copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from koinon.payload import tree
from koinon.site import Agent, State
from koinon.task import Board, Task


class Local:
    """Lets one site after the other answer, on the caller's thread.

    Args:
        agent: the agent of a site, made when its turn comes.
        states: what the sites remember from before (after a resume).
    """

    def __init__(self, agent: Callable[[str], Agent], states: dict[str, State] | None = None) -> None:
        self._agent = agent
        self._states: dict[str, State] = dict(states or {})
        self._shown: tuple[Task, Task] | None = None

    def now(self) -> float:
        """Seconds of a monotonic clock."""
        return time.monotonic()

    def wait(self, board: Board, task: str) -> None:
        """Let the next site that waits for this task do its work."""
        site = board.next_waiting(task)
        leased = board.pull(site, self.now()) if site is not None else None
        if site is None or leased is None:
            return
        result, state = self._agent(site).work(self._read_only(leased), self._states.get(site, {}))
        if state:
            self._states[site] = state  # most sites remember nothing, and cost nothing
        board.answer(result, self.now())

    def site_states(self) -> dict[str, Any]:
        """What the sites remember."""
        return self._states

    def _read_only(self, task: Task) -> Task:
        """The task with arrays that refuse to be written; made once for all its sites."""
        if self._shown is None or self._shown[0] is not task:
            payload = task.payload.with_arrays(tree.read_only(task.payload.arrays))
            self._shown = (task, replace(task, payload=payload))
        return self._shown[1]
