"""What an admin does from afar: hand a job to a federation, watch it, fetch what came of it."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from koinon.data import Split
from koinon.data.names import Names
from koinon.errors import KitError, LinkError, QuorumNotReached, RunError, SettingsError
from koinon.operate import session
from koinon.operate.session import Order
from koinon.provision import poc
from koinon.site import bundle
from koinon.site.kit import open_kit
from koinon.tracking import Event, Run, Sink, next_free, read
from koinon.transport.http import Link
from koinon.transport.tls import client_context

T = TypeVar("T")

POC = Path("poc")
"""Where `koinon poc start` puts a proof of concept, and `--on poc` looks for one."""

SHOWN = ("run.json", "metrics.csv", "commit.json", "failures.log", "last.safetensors", "best.safetensors")
"""What of a run folder is fetched."""

OVER = ("finished", "failed", "stopped")


def anywhere(order: Order, out: Path | None, sinks: Sequence[Sink], *, sites: int | None = None) -> Run:
    """Run what is ordered where it is ordered: in a federation, or simulated."""
    if order.on == "poc" or (order.on and Path(order.on, "kit.json").exists()):
        return run(order, out, sinks, sites=sites)
    return session.run(order, out, sinks)


def run(order: Order, out: Path | None, sinks: Sequence[Sink], *, sites: int | None = None) -> Run:
    """Run what is ordered in the federation that `order.on` names: a kit's folder; or `poc`, for one on this machine
    that is made for this run if there is none in the folder poc.

    Raises:
        RunError: `out` exists.
        QuorumNotReached: it failed, or was stopped.
        LinkError: the server cannot be reached.
    """
    path = out or next_free(Path("runs"), Path(order.file).stem)
    if path.exists():
        raise RunError(f"'{path}' exists: name another with --out")
    if order.alone:
        raise SettingsError("--alone trains on every site's data here: leave it out, or leave out --on")
    refused: dict[str, Any] = {}

    def keep(event: Event) -> None:
        if event.kind == "refused":
            refused.update(event.values)

    order, names = _asked(order, sites) if order.on == "poc" else (order, None)
    with _kit(order.on, names) as kit, closing(linked(kit)) as link:
        opened = open_kit(kit)
        job = link.submit(bundle.pack(order, opened, sites=names))
        try:
            reason = follow(link, job, [keep, *(_here(path, sink) for sink in sinks)])
        except KeyboardInterrupt:
            ways = f"`koinon fetch {job} --kit {kit}` brings what there is, `koinon stop {job} --kit {kit}` ends it"
            raise KeyboardInterrupt(f"job '{job}' goes on without you: {ways}") from None
        patiently(partial(fetch, link, job, path), sinks)
    if reason:
        said = f"{reason}\nwhat it has left is in {path}" if path.exists() else reason
        raise QuorumNotReached(said, str(refused.get("traceback", "")))
    return session.publish(read(path), sinks)


def linked(kit: Path) -> Link:
    """To the server of an admin's kit.

    Raises:
        KitError: it is no kit, or not of an admin.
    """
    opened = open_kit(kit)
    if opened.role in ("server", "site"):
        raise KitError(f"'{kit}' is the kit of {opened.role} '{opened.name}', not of an admin")
    return Link(opened.servers, lambda: client_context(opened))


def follow(link: Link, job: str, sinks: Sequence[Sink]) -> str:
    """Tell the sinks what happens in a job, until it is over; the line may be cut meanwhile.

    Returns:
        Why it is over, if it did not finish.
    """
    after, rest, state = 0, b"", ""
    while state not in OVER or rest:
        new, state = patiently(partial(link.events, job, after), sinks)
        after, rest = after + len(new), rest + new
        *lines, rest = rest.split(b"\n")
        for line in lines:
            event = Event(**json.loads(line))
            for sink in sinks:
                sink(event)
        if state in OVER and not new:
            break
    said = patiently(partial(link.job, job), sinks)
    return "" if said["state"] == "finished" else f"job '{job}' {said['state']}: {said['reason']}"


def patiently(call: Callable[[], T], sinks: Sequence[Sink] = ()) -> T:
    """What a call gives, tried again as long as the server cannot be reached; that is said once."""
    while True:
        try:
            return call()
        except LinkError as cause:
            for sink in sinks:
                sink(Event("warning", 0.0, values={"message": f"{cause}; the job goes on, and this looks again"}))
            sinks = ()
            time.sleep(1.0)


def fetch(link: Link, job: str, out: Path) -> None:
    """A job's run folder, as far as there is one."""
    files = [file["name"] for file in link.files(job) if file["name"] in SHOWN]
    if not files:
        return
    out.mkdir(parents=True, exist_ok=True)
    for name in files:
        link.file(job, name, out / name)


def _here(path: Path, sink: Sink) -> Sink:
    """A sink that is told where the run will be here, not where it is at the server."""
    return lambda event: sink(
        event._replace(values={**event.values, "run": str(path)}) if event.kind == "start" else event
    )


def _asked(order: Order, sites: int | None) -> tuple[Order, Sequence[str]]:
    """The order, and the names of the sites that it deals its data to: so many, where the job can be told."""
    told = replace(order, settings={"sites": str(sites), **order.settings}) if sites else order
    try:
        job = told.job()
    except SettingsError:  # it has no such setting
        told, job = order, order.job()
    if isinstance(job.data, Split):
        if sites not in (None, job.data.sites):
            raise SettingsError(f"this job deals its data to {job.data.sites} sites: leave out --sites {sites}")
        return told, list(job.data.names)
    return told, list(Names(sites or 4))


@contextmanager
def _kit(on: str, sites: Sequence[str] | None) -> Iterator[Path]:
    """The kit with which to submit."""
    if on != "poc":
        yield Path(on)
    elif (POC / "processes.json").exists():
        there = {row["name"] for row in poc.status(POC)} - {"server"}
        if strange := [name for name in sites or () if name not in there]:
            names = f"{', '.join(strange[:3])}{' …' if len(strange) > 3 else ''}"
            raise RunError(
                f"the proof of concept in '{POC}' has {len(there)} sites, and the job asks {names} too: "
                "end it with `koinon poc stop`, and this command makes one of its own"
            )
        yield poc.admin(POC)
    else:
        folder, ends = Path(tempfile.mkdtemp(prefix="koinon-poc-")), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = [signal.signal(which, _interrupted) for which in ends]
        try:
            poc.start(folder, sites or ())
            yield poc.admin(folder)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped, and the federation with it that was made for this run") from None
        finally:
            for which in ends:
                signal.signal(which, signal.SIG_IGN)  # whoever is impatient would leave processes behind
            poc.stop(folder)
            shutil.rmtree(folder, ignore_errors=True)
            for which, handler in zip(ends, before, strict=True):
                signal.signal(which, handler)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt
