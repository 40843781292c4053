"""What a server and its sites say to each other, besides the bytes of models: a closed schema, as JSON.

    site -> server   Poll           what it holds, and that it lives
    server -> site   Orders         what it should work on, and what nobody waits for any more
    site -> server   (a blob)       its answer, in pieces, resumed where it was cut; then Receipt

A name that a later version adds is ignored by an earlier one, and has a default: servers and sites that are one
minor version apart understand each other.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from koinon.errors import Refused

VERSION = (1, 0)
"""Of what is said here: (major, minor)."""

T = TypeVar("T")

JOIN = "join"
"""The task that every site is asked first, and no executor answers: how many samples it holds."""


class Assignment(msgspec.Struct, frozen=True):
    """A task as a site hears of it.

    Args:
        job: the job's id.
        task: the task's id in that job.
        name: what executors answer to.
        round: the controller's.
        digest: SHA-256 of the payload's bytes (payload.codec), as hexadecimal digits.
        size: of the payload, in bytes.
        bundle: SHA-256 of the job's bundle; `bundle_size` in bytes.
        share: which of how many sites this one is to the job, from 0, for data that the job brings; nothing: unknown.
    """

    job: str
    task: str
    name: str
    round: int
    digest: str
    size: int
    bundle: str
    bundle_size: int = 0
    share: list[int] = []


class Poll(msgspec.Struct, frozen=True):
    """A site's question.

    Args:
        version: of what is said.
        holding: job -> the tasks that it works on, or whose answers it has not been able to deliver.
        jobs: all jobs of which it keeps anything.
        wait: for how many seconds the server may keep it waiting if there is nothing to say.
        troubles: job -> why it cannot go on with it for now, such as a full disk.
    """

    version: tuple[int, int] = VERSION
    holding: dict[str, list[str]] = {}
    jobs: list[str] = []
    wait: float = 25.0
    troubles: dict[str, str] = {}


class Orders(msgspec.Struct, frozen=True):
    """The server's answer.

    Args:
        assignments: what to work on; none of what the site holds.
        dropped: job -> tasks that it holds and nobody waits for.
        ended: jobs of which it keeps something and that are over.
        revoked: the signed list of names that are no longer of the project, if the site's is older; otherwise empty.
    """

    assignments: list[Assignment] = []
    dropped: dict[str, list[str]] = {}
    ended: list[str] = []
    revoked: str = ""


class Receipt(msgspec.Struct, frozen=True):
    """What the server has of an answer.

    Args:
        offset: how many bytes of it are on its disk.
        verdict: what became of it, if it is complete (task.Verdict); otherwise empty.
    """

    offset: int = 0
    verdict: str = ""


def encode(message: msgspec.Struct) -> bytes:
    """A message as JSON."""
    return msgspec.json.encode(message)


def decode(data: bytes, kind: type[T]) -> T:
    """The message in these bytes.

    Raises:
        Refused: there is none of this kind.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError) as cause:
        raise Refused(f"this is no {kind.__name__}: {cause}") from cause


def understood(version: tuple[int, int]) -> None:
    """Whether what another says can be understood.

    Raises:
        Refused: its version is more than one minor version away.
    """
    if version[0] != VERSION[0] or abs(version[1] - VERSION[1]) > 1:
        theirs, ours = (".".join(map(str, one)) for one in (version, VERSION))
        raise Refused(f"version {theirs} and version {ours} of the protocol do not understand each other: update one")
