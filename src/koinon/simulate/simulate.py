"""Many sites in one process: the whole path of a round, with the local transport and the inline runner."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from koinon import tracking
from koinon.control import Federation, Sites
from koinon.data import Source, Split, iid
from koinon.errors import DataError, KoinonError, RunError, SettingsError, in_a_line
from koinon.payload import Plain, tree
from koinon.site import Inline, Runner
from koinon.task import Job, JobState, move
from koinon.tracking import FEDERATION, SERVER, Commit, Folder, Run, Sink, Tracker
from koinon.transport import Local

PICTURED = 200
"""A partition of more sites is recorded by its figures only."""


def simulate(
    job: Job,
    data: Split | Source | None = None,
    *,
    sites: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    alone: bool = False,
    sinks: Sequence[Sink] | None = None,
) -> Run:
    """Run a job over virtual sites, in this process.

    Two runs of the same job, data and seed end in the same bits, also if one was killed and resumed.

    Args:
        job: what runs.
        data: what the sites hold: a split, or a source that is dealt out evenly over `sites`; by default
            the job's own.
        sites: how many, where `data` is a source.
        seed: of every random stream but the partition's, which has its own.
        out: the run folder to make; by default the first free `runs/<controller>-<n>`.
        resume: go on from the last commit of the run in `out`.
        alone: also train every site alone, with the same budget, to see who gains by joining.
        sinks: who is told of every event besides the run folder; by default a live view.

    Returns:
        The finished run, read back from its folder.

    Raises:
        KoinonError: what could not be done, by whom, and what to do.  The run folder keeps the last commit.
    """
    split = _split(job.data if data is None else data, sites)
    path = Path(out) if out else tracking.next_free(Path("runs"), type(job.controller).__name__.lower())
    model = job.first_model(seed)  # before anything is written: a job that cannot start leaves no folder
    runner = Inline(job)
    info, parties = {**_info(job, split, seed), "forms": runner.forms}, _sites(split)
    folder = Folder.reopen(path, info) if resume else Folder.create(path, info)
    last = folder.last() if resume else None
    if last and (wrong := tree.mismatch(model, last.state["model"])):
        folder.set_state("failed", "it was resumed with another model")
        raise RunError(f"'{path}' was begun with another model: the job has now {wrong}")
    tracker = Tracker(folder, *([tracking.live()] if sinks is None else sinks), after=last.time if last else 0.0)
    transport = Local(job, split.site, runner=runner, seed=seed, states=last.sites if last else {})
    federation = Federation(job, parties, transport=transport, store=folder, tracker=tracker, seed=seed, last=last)
    about = {"run": str(path), "rounds": info["rounds"], "sites": split.sites, "resumed": last.round if last else 0}
    tracker.emit("start", last.round if last else 0, values=about)
    state: JobState = move("submitted", "running")
    end, reason = move(state, "stopped"), "interrupted"
    try:
        job.controller.run(federation, model)
        if alone:
            _alone(job, split, seed, runner=runner, tracker=tracker, folder=folder)
        end, reason = move(state, "finished"), ""
    except Exception as error:
        end, reason = move(state, "failed"), in_a_line(error)
        raise
    finally:
        folder.set_state(end, reason)
        tracker.emit("end", values={"state": end, "reason": reason})
    return tracking.read(path)


def _split(data: Any, sites: int | None) -> Split:
    """The split to run on.

    Raises:
        SettingsError: there is none.
    """
    if isinstance(data, Source):
        return data.split(iid(), sites=sites)
    if data is None:
        raise SettingsError("there are no data to deal out: give data= to the Job or to simulate()")
    if sites is not None and sites != data.sites:
        raise SettingsError(f"the data are dealt out over {data.sites} sites already; sites={sites} cannot change that")
    split: Split = data
    return split


def _sites(split: Split) -> Sites:
    """All sites take part; those that hold held-out data evaluate, and so does the server if it holds some.

    Raises:
        DataError: a site has a name that stands for somebody else.
    """
    for name in (SERVER, FEDERATION):
        if name in split.names:
            raise DataError(f"a site may not be called '{name}', which has another meaning: name it otherwise")
    return Sites(split.names, [*split.evaluators, *([SERVER] if split.server is not None else [])])


def _alone(job: Job, split: Split, seed: int, *, runner: Runner, tracker: Tracker, folder: Folder) -> None:
    """Train every site by itself with the job's own controller, and record its metrics as `alone_…`."""
    if not split.evaluators:
        message = "alone: no site holds held-out data to judge its own model by; split(…, test='sites') deals them out"
        tracker.emit("warning", values={"message": message})
        return
    rounds, rows = getattr(job.controller, "rounds", 0), tracking.read(folder.path).rows
    known = {row.site for row in rows if row.name.startswith("alone_") and row.round == rounds}  # before a resume
    for name in split.evaluators:
        if name in known:
            continue
        commits: list[Commit] = []
        only = Sites([name], [name])
        transport = Local(job, split.site, runner=runner, seed=seed, states={})
        store = SimpleNamespace(commit=commits.append)
        federation = Federation(job, only, transport=transport, store=store, tracker=Tracker(), seed=seed)
        try:
            job.controller.run(federation, job.first_model(seed))
        except KoinonError as error:  # what was trained together stands, whatever becomes of one who tries alone
            tracker.emit("warning", site=name, values={"message": f"could not be trained alone: {error}"})
            continue
        last = commits[-1]
        shown = {f"alone_{metric}": last.metrics[metric] for metric in (job.score, "loss") if metric in last.metrics}
        tracker.emit("metric", last.round, name, shown)
    folder.flush()


def _info(job: Job, split: Split, seed: int) -> dict[str, Plain]:
    """What run.json says from the start."""
    partition = {**split.describe()}
    if split.sites <= PICTURED:
        partition |= {"names": list(split.names), "labels": [str(label) for label in split.labels]}
        partition["table"] = split.table().tolist()
    return {
        "job": type(job.controller).__name__,
        "seed": seed,
        "rounds": getattr(job.controller, "rounds", 0),
        "sites": split.sites,
        "score": job.score,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": job.describe(),
        "partition": partition,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """Of Python, Koinon and the libraries that can change a result."""
    versions = {"python": platform.python_version(), "machine": platform.platform()}
    for name in ("koinon", "numpy", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
