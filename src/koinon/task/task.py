"""A task: a named piece of work for some sites.  A result: one site's answer to it, as it travels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from koinon.payload import Payload


@dataclass(frozen=True)
class Task:
    """A named piece of work.

    Args:
        id: unique in its job.
        name: what executors answer to: `train`, `evaluate` or a job's own word.
        round: the controller's round that it belongs to.
        payload: what the sites get.
        sites: who is asked, in this order.
        quorum: how many answers are enough.
        deadline: when the task ends whoever is missing, in seconds of the caller's clock; None waits for all.
        enough: answers after which it ends, whoever is missing; None waits for all.
    """

    id: str
    name: str
    round: int
    payload: Payload
    sites: tuple[str, ...]
    quorum: int = 1
    deadline: float | None = None
    enough: int | None = None


@dataclass(frozen=True)
class Failure:
    """Why a site could not answer: one line, and its own traceback as text."""

    reason: str
    traceback: str = ""


class Result(NamedTuple):
    """One site's answer to one task: a payload, or a failure.

    Args:
        task: the task's id.
        site: who answers.
        payload: the answer, encoded for the way up; None where there is a failure.
        failure: why there is no answer.
        seconds: how long the site worked.
    """

    task: str
    site: str
    payload: Payload | None = None
    failure: Failure | None = None
    seconds: float = 0.0

    @property
    def sites(self) -> tuple[str, ...]:
        """Who answers."""
        return (self.site,)

    @property
    def failures(self) -> Mapping[str, Failure]:
        """Why, where there is no answer."""
        return {self.site: self.failure} if self.failure else {}
