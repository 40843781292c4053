"""A task: a named piece of work for some sites.  A result: one site's answer to it."""

from __future__ import annotations

from dataclasses import dataclass

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
        lease: seconds a site may hold the task without a sign of life before it is offered again.
    """

    id: str
    name: str
    round: int
    payload: Payload
    sites: tuple[str, ...]
    quorum: int = 1
    deadline: float | None = None
    lease: float = float("inf")


@dataclass(frozen=True)
class Failure:
    """Why a site could not answer: one line, and its own traceback as text."""

    reason: str
    traceback: str = ""


@dataclass(frozen=True)
class Result:
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
