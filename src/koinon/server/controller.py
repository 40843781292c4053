"""A job's own process at the server: its controller, and nothing that could reach the network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from koinon.control import Federation, Sites, about, conduct, opened
from koinon.data import own
from koinon.errors import JobError, KoinonError, QuorumNotReached, in_a_line
from koinon.site import Agent, bundle, child, in_loops, inline, jobfile
from koinon.task import Job, Result, Task
from koinon.tracking import SERVER, Event, Folder
from koinon.tracking.folder import write_json
from koinon.tracking.run import read_json
from koinon.transport.remote import Remote, Stopped


def main() -> None:
    """Run a job to its end, or until this process is killed; started again, it goes on after the last commit."""
    line = child.parent()
    order = next(line.hear())
    run = Path(order["run"])
    try:
        _run(line, order, run)
        state, reason = "finished", ""
    except Stopped:
        state, reason = "stopped", "on demand"
    except Exception as error:
        state, reason = "failed", in_a_line(error)
    line.say(state=state, reason=reason)


def _run(line: child.Parent, order: dict[str, Any], run: Path) -> None:
    manifest = bundle.manifest(order["manifest"])
    try:
        job = in_loops(jobfile.ordered(manifest, Path(order["job"], manifest.file)))
    except KoinonError as error:
        raise JobError(f"at the server: {error}") from error
    sites: list[str] = order["sites"]
    job.fits(sites)
    model = job.first_model(manifest.seed)
    info = about(job, manifest.seed, sites=len(sites), partition={"names": sites}) | {"on": {"where": "federation"}}
    if resumed := (run / "run.json").exists():  # whoever wrote it is dead, or nobody would have started this process
        write_json(run / "run.json", {**(read_json(run / "run.json") or {}), "state": "stopped"})
    folder = Folder.reopen(run, info) if resumed else Folder.create(run, info)
    folder.durable = True
    transport = Remote(line, run, limit=order["round"], home=_home(job, order["data"], manifest.seed))
    with (run / "events.jsonl").open("a", buffering=1) as events:

        def tell(event: Event) -> None:
            events.write(json.dumps(event._asdict(), default=str) + "\n")

        last, tracker = opened(folder, model, [tell])
        try:
            transport.join(sites, job.quorum)
        except QuorumNotReached as short:
            folder.set_state("failed", in_a_line(short))
            raise
        finally:
            for site, failure in transport.unfit.items():
                tracker.emit("refused", 0, site, vars(failure))
        if transport.home is not None:
            transport.evaluators.append(SERVER)
        parties = Sites(sites, transport.evaluators, transport.samples)
        federation = Federation(
            job, parties, transport=transport, store=folder, tracker=tracker, seed=manifest.seed, last=last
        )
        conduct(federation, model, folder=folder, tracker=tracker, after=last.round if last else 0)


def _home(job: Job, settings: dict[str, Any], seed: int) -> Callable[[Task], Result] | None:
    """What answers for the server itself, if it holds data to test with."""
    held = own.at(settings, job.data, SERVER) if settings else None
    if held is None or held.test is None or "evaluate" not in job.answers:
        return None
    agent = Agent(job, lambda site: held, inline(job, threads=1), seed)
    return lambda task: agent.work(task, SERVER, {})


if __name__ == "__main__":
    main()
