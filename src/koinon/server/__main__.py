"""`python -m koinon.server --kit DIR`: a server, until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import logging
import os
import resource
import signal
import ssl
import sys
import time
from asyncio.sslproto import SSLProtocol
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from sqlalchemy.exc import SQLAlchemyError

from koinon.errors import KitError, KoinonError, SettingsError
from koinon.server.access import Door
from koinon.server.blobs import Blobs
from koinon.server.jobs import CONTROLLER, Jobs
from koinon.server.service import Service
from koinon.server.store import Store
from koinon.site.kit import Kit, ServerSettings, open_kit, settings
from koinon.transport.tls import server_context

HANDSHAKE = 10.0
"""Seconds within which a connection must have shown its certificate."""

IDLE = 30.0
"""Seconds within which it must have asked something."""

BUFFER = 1 << 16
"""Bytes that asyncio sets aside for each connection, known or not; by itself it takes four times as much."""

_LOG, _HTTP = logging.getLogger("koinon.server"), logging.getLogger("koinon.server.http")


def main(given: Sequence[str] | None = None) -> int:
    """Serve; the exit status."""
    parser = argparse.ArgumentParser(prog="koinon.server", description="The server of a federation.")
    parser.add_argument("--kit", required=True, type=Path, help="the server's kit")
    parser.add_argument("--store", default="", help="a database's URL: sqlite:///PATH or postgresql://…")
    parser.add_argument("--log", choices=["text", "json"], default="text", help="how each line is written")
    parser.add_argument("--status-port", type=int, default=None, help="answer /healthz and /metrics on 127.0.0.1")
    asked = parser.parse_args(given)
    logging_as(asked.log)
    try:
        kit = open_kit(asked.kit)
        if kit.role != "server":
            raise KitError(f"'{asked.kit}' is the kit of {kit.role} '{kit.name}', not of a server")
        asyncio.run(serve(kit, store=asked.store, status_port=asked.status_port))
    except KoinonError as error:
        _LOG.error("%s", error)
        return 1
    return 0


async def serve(
    kit: Kit,
    *,
    store: str = "",
    status_port: int | None = None,
    controller: str = CONTROLLER,
    beside: Callable[[Jobs], AbstractAsyncContextManager[None]] | None = None,
    hidden: Sequence[Path] = (),
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        kit: the server's.
        store: a database's URL, instead of that in the settings.
        status_port: for whoever asks on this machine.
        controller: what a job's process runs.
        beside: lives as long as the server serves.
        hidden: more files that no job may read.

    Raises:
        KoinonError: it cannot begin.
    """
    with locked(kit.run):
        wanted = settings(kit, ServerSettings)
        secrets = (kit.key, kit.issuer.with_suffix(".key"), kit.path / "settings.toml", kit.run / "store", *hidden)
        (kit.run / "store").mkdir(exist_ok=True)
        url = store or wanted.store or f"sqlite:///{kit.run / 'store' / 'koinon.sqlite'}"
        opened = Store(url, Blobs(kit.run))
        if opened.swept:
            _LOG.info("removed %d files that the last run left behind", opened.swept)
        closed = [path for path in secrets if path.exists()]
        jobs = Jobs(opened, wanted, folder=kit.run / "jobs", hidden=closed, module=controller)
        await _serve(kit, jobs, status_port, beside(jobs) if beside else contextlib.AsyncExitStack())


async def _serve(kit: Kit, jobs: Jobs, status_port: int | None, beside: AbstractAsyncContextManager[Any]) -> None:
    over, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    service = Service(kit, jobs, Door(kit))
    try:
        await jobs.open()
        jobs.spawn(service.watch())
        context = server_context(kit)
        context.sslobject_class = Handshake
        SSLProtocol.max_size = BUFFER
        async with listening(service.app(), jobs.settings.listen, context) as port, status(jobs, status_port), beside:
            _LOG.info("the server of '%s' listens at port %d", kit.project, port)
            await over.wait()
            _LOG.info("the server ends; its jobs go on when it is started again")
            jobs.closing = True
            jobs.wake()
    finally:
        await jobs.close()


@contextlib.asynccontextmanager
async def listening(app: web.Application, listen: str, context: ssl.SSLContext | None) -> AsyncIterator[int]:
    """An application at an address; its port.

    Raises:
        SettingsError: the address cannot be had.
    """
    host, _, port = listen.rpartition(":")
    limits: dict[str, Any] = {"keepalive_timeout": IDLE, "shutdown_timeout": 2.0, "read_bufsize": BUFFER}
    runner = web.AppRunner(app, access_log=None, logger=_HTTP, **limits)
    await runner.setup()
    assert runner.server
    limit, loop = HANDSHAKE if context else None, asyncio.get_running_loop()
    place = (runner.server, host.strip("[]") or None)
    try:
        server = await loop.create_server(*place, int(port), backlog=1024, ssl=context, ssl_handshake_timeout=limit)
    except (OSError, ValueError, OverflowError) as cause:
        raise SettingsError(f"the server cannot listen at '{listen}': {cause}") from cause
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await runner.cleanup()


@contextlib.asynccontextmanager
async def status(jobs: Jobs, port: int | None) -> AsyncIterator[None]:
    """Whether all is well, and its numbers, for whoever asks on this machine."""
    if port is None:
        yield
        return

    async def healthz(_: web.Request) -> web.Response:
        try:
            await jobs.durable(jobs.store.sites)
        except (OSError, SQLAlchemyError) as cause:
            return web.json_response({"status": f"the store cannot be reached: {cause}"}, status=503)
        return web.json_response({"status": "ok", "jobs": len(jobs.running), "sites": len(jobs.connected())})

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text=measures(jobs))

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/metrics", metrics)
    async with listening(app, f"127.0.0.1:{port}", None) as at:
        _LOG.info("its numbers are at http://127.0.0.1:%d/metrics", at)
        yield


def measures(jobs: Jobs) -> str:
    """The server's numbers as Prometheus reads them."""
    states, counts = Counter(entry.state for entry in jobs.entries.values()), jobs.counts
    open_tasks = sum(len(job.tasks) for job in jobs.running.values())
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    gauges = {f'jobs{{state="{state}"}}': count for state, count in states.items()}
    gauges |= {"sites_connected": len(jobs.connected()), "open_tasks": open_tasks}
    gauges |= {"resident_memory_bytes": pages * os.sysconf("SC_PAGE_SIZE")}
    verdicts = {f'results_total{{verdict="{name}"}}': counts[name] for name in ("accepted", "duplicate", "late")}
    totals = {f"{name}_total": counts[name] for name in ("refused", "bytes_in", "bytes_out", "uploads_resumed")}
    rows = [(name, "gauge", value) for name, value in gauges.items()]
    rows += [(name, "counter", value) for name, value in (verdicts | totals).items()]
    kinds = {name.partition("{")[0]: kind for name, kind, _ in rows}
    lines = {name: [f"# TYPE koinon_{name} {kind}"] for name, kind in kinds.items()}
    for name, _, value in rows:
        lines[name.partition("{")[0]].append(f"koinon_{name} {value}")
    return "\n".join(line for several in lines.values() for line in several) + "\n"


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """One server at a time works in a kit.

    Raises:
        KitError: another does.
    """
    run.mkdir(mode=0o700, exist_ok=True)
    with (run / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as taken:
            file.seek(0)
            raise KitError(f"a server runs with this kit already, in process {file.read()}: stop it first") from taken
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class Lines(logging.Formatter):
    """One line an event, for machines to read: at, level, where, what; and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        said = {"at": record.created, "level": record.levelname.lower(), "where": record.name}
        said["what"] = record.getMessage()
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said)


class Malformed(logging.Filter):
    """What is no HTTP is worth a line, not a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            said = " ".join(error.message.split())[:200]
            record.msg, record.exc_info = f"{record.msg}: %s", None
            record.args = (*(record.args or ()), said)
        return True


_HTTP.addFilter(Malformed())


def logging_as(form: str) -> None:
    """Let all that is logged go to standard error, as text or as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    handler.setFormatter(Lines() if form == "json" else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class Handshake(ssl.SSLObject):
    """Says in the log, once a second at most, why somebody is refused before anything is known of them."""

    said = 0.0

    def do_handshake(self) -> None:
        """As in every SSLObject."""
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as cause:
            if time.monotonic() > Handshake.said + 1:
                Handshake.said = time.monotonic()
                _LOG.warning("refused somebody without a certificate of this project that holds now: %s", cause)
            raise


if __name__ == "__main__":
    sys.exit(main())
