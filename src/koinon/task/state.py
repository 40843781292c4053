"""The state of a job, and what may follow it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from koinon.errors import JobError

JobState: TypeAlias = Literal["submitted", "running", "finished", "failed", "stopped"]
"""Where a job is in its life."""

TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    "submitted": frozenset({"running", "stopped"}),
    "running": frozenset({"finished", "failed", "stopped"}),
    "stopped": frozenset({"running"}),  # a stopped or failed job is resumed from its last commit
    "failed": frozenset({"running"}),
    "finished": frozenset({"running"}),  # with more rounds
}


def move(before: JobState, after: JobState) -> JobState:
    """The state `after`, if it may follow `before`.

    Raises:
        JobError: it may not.
    """
    if after not in TRANSITIONS[before]:
        raise JobError(f"a job that is {before} cannot become {after}")
    return after
