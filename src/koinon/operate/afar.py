"""What an admin does from afar: hand a job to a federation, watch it, fetch what came of it."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from koinon.data import Split
from koinon.data.names import Names
from koinon.errors import LinkError, RunError, SettingsError
from koinon.operate import session
from koinon.operate.session import Order, publish
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
    if order.on == "poc" or Path(order.on, "kit.json").exists():
        return run(order, out, sinks, sites=sites)
    return session.run(order, out, sinks)


def run(order: Order, out: Path | None, sinks: Sequence[Sink], *, sites: int | None = None) -> Run:
    """Run what is ordered in the federation that `order.on` names: a kit's folder; or `poc`, for one on this machine
    that is made for this run if there is none in the folder poc.

    Raises:
        RunError: it failed, or `out` exists.
        LinkError: the server cannot be reached.
    """
    path = out or next_free(Path("runs"), Path(order.file).stem)
    if path.exists():
        raise RunError(f"'{path}' exists: name another with --out")
    if order.alone:
        raise SettingsError("--alone trains on every site's data here: leave it out, or leave out --on")
    order, names = _asked(order, sites) if order.on == "poc" else (order, None)
    with _kit(order.on, names) as kit:
        opened, link = open_kit(kit), linked(kit)
        job = link.submit(bundle.pack(order, opened, sites=names))
        reason = follow(link, job, sinks)
        patiently(partial(fetch, link, job, path))
    if reason:
        raise RunError(reason)
    return publish(read(path), sinks)


def linked(kit: Path) -> Link:
    """To the server of an admin's kit."""
    opened = open_kit(kit)
    return Link(opened.servers, lambda: client_context(opened))


def follow(link: Link, job: str, sinks: Sequence[Sink]) -> str:
    """Tell the sinks what happens in a job, until it is over; the line may be cut meanwhile.

    Returns:
        Why it is over, if it did not finish.
    """
    after, rest, state = 0, b"", ""
    while state not in OVER or rest:
        new, state = patiently(partial(link.events, job, after))
        after, rest = after + len(new), rest + new
        *lines, rest = rest.split(b"\n")
        for line in lines:
            event = Event(**json.loads(line))
            for sink in sinks:
                sink(event)
        if state in OVER and not new:
            break
    said = patiently(partial(link.job, job))
    return "" if said["state"] == "finished" else f"job '{job}' {said['state']}: {said['reason']}"


def patiently(call: Callable[[], T]) -> T:
    """What a call gives, tried again as long as the server cannot be reached."""
    while True:
        try:
            return call()
        except LinkError:
            time.sleep(1.0)


def fetch(link: Link, job: str, out: Path) -> None:
    """A job's run folder, as far as there is one."""
    files = [file["name"] for file in link.files(job) if file["name"] in SHOWN]
    if not files:
        return
    out.mkdir(parents=True, exist_ok=True)
    for name in files:
        link.file(job, name, out / name)


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
        yield poc.admin(POC)
    else:
        folder = Path(tempfile.mkdtemp(prefix="koinon-poc-"))
        try:
            poc.start(folder, sites or ())
            yield poc.admin(folder)
        finally:
            poc.stop(folder)
            shutil.rmtree(folder, ignore_errors=True)
