"""A job's run from its start to its end, wherever its sites are: what is recorded, and how it ends."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata

from koinon.control.federation import Federation
from koinon.errors import RunError, in_a_line
from koinon.payload import Arrays, Plain, tree
from koinon.task import Job, JobState, move
from koinon.tracking import Commit, Folder, Sink, Tracker


def about(
    job: Job, seed: int, *, sites: int, partition: Mapping[str, Plain], more: Mapping[str, Plain] | None = None
) -> dict[str, Plain]:
    """What run.json says from the start.

    Args:
        job: what runs.
        seed: of the run.
        sites: how many take part.
        partition: who holds what, as far as it is known.
        more: settings besides the job's own.
    """
    return {
        "job": type(job.controller).__name__,
        "seed": seed,
        "rounds": getattr(job.controller, "rounds", 0) or sites + 1,
        "sites": sites,
        "score": job.score,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": job.describe() | {**(more or {})},
        "partition": {**partition},
        "versions": _versions(),
    }


def opened(folder: Folder, model: Arrays, sinks: Sequence[Sink]) -> tuple[Commit | None, Tracker]:
    """The commit to go on from, if there is one, and who is told of everything.

    Raises:
        RunError: the folder's run was begun with another model.
    """
    last = folder.last()
    if last and (wrong := tree.mismatch(model, last.state["model"])):
        folder.set_state("failed", "it was resumed with another model")
        raise RunError(f"'{folder.path}' was begun with another model: the job has now {wrong}")
    return last, Tracker(folder, *sinks, after=last.time if last else 0.0)


def conduct(federation: Federation, model: Arrays, *, folder: Folder, tracker: Tracker, after: int = 0) -> None:
    """Let the job's controller run after the last committed round, and record how it ends.

    If an executor answers the task `prepare`, every site is asked for it once before the first round, with the first
    model; not where the controller asks for it itself.

    Raises:
        Exception: whatever ended it; the folder keeps the last commit.
    """
    said = {"run": str(folder.path), "rounds": folder.info["rounds"], "sites": len(federation.sites), "resumed": after}
    tracker.emit("start", after, values=said)
    state: JobState = move("submitted", "running")
    end, reason = move(state, "stopped"), "interrupted"
    try:
        controller = federation.job.controller
        if not after and "prepare" in federation.job.answers.keys() - {*getattr(controller, "asks", ())}:
            for _ in federation.stream(federation.broadcast("prepare", model, to=federation.sites)):
                pass  # what it says is for nobody: the site remembers
        controller.run(federation, model)
        end, reason = move(state, "finished"), ""
    except Exception as error:
        end, reason = move(state, "failed"), in_a_line(error)
        raise
    finally:
        folder.set_state(end, reason)
        tracker.emit("end", values={"state": end, "reason": reason})


def _versions() -> dict[str, str]:
    """Of Python, Koinon and the libraries that can change a result."""
    versions = {"python": platform.python_version(), "machine": platform.platform()}
    for name in ("koinon", "numpy", "torch", "tensorflow", "jax", "jaxlib"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
