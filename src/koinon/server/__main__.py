"""`python -m koinon.server --kit DIR`: a server, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import signal
import ssl
import sys
import time
from argparse import Namespace
from asyncio.sslproto import SSLProtocol
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from sqlalchemy.exc import SQLAlchemyError

from koinon.errors import SettingsError
from koinon.server.access import Door
from koinon.server.blobs import Blobs
from koinon.server.jobs import CONTROLLER, Jobs
from koinon.server.service import PIECE, Service
from koinon.server.store import Store
from koinon.site.kit import Kit, ServerSettings, settings
from koinon.transport import process

HANDSHAKE = 10.0
"""Seconds within which a connection must have shown its certificate."""

IDLE = 30.0
"""Seconds within which it must have asked something."""

BUFFER = 1 << 16
"""Bytes that asyncio sets aside for each connection, known or not; by itself it takes four times as much."""

_LOG, _HTTP = logging.getLogger("koinon.server"), logging.getLogger("koinon.server.http")


def main(given: Sequence[str] | None = None) -> int:
    """Serve; the exit status."""
    parser = process.options("koinon server")
    parser.add_argument("--store", default="", help="a database's URL: sqlite:///PATH or postgresql://…")
    return process.run(parser, given, _run)


def _run(asked: Namespace) -> None:
    with process.taken(asked.kit, "server") as kit:
        asyncio.run(serve(kit, store=asked.store, status_port=asked.status_port))


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
    wanted = settings(kit, ServerSettings)
    secrets = (kit.key, kit.issuer.with_suffix(".key"), kit.path / "settings.toml", kit.run / "store", *hidden)
    (kit.run / "store").mkdir(exist_ok=True)
    url = store or wanted.store or f"sqlite:///{kit.run / 'store' / 'koinon.sqlite'}"
    opened = Store(url, Blobs(kit.run))
    if opened.swept:
        _LOG.info("removed %d files that the last run left behind", opened.swept)
    closed = [path for path in secrets if path.exists()]
    jobs = Jobs(opened, wanted, folder=kit.run / "jobs", hidden=closed, module=controller)
    over, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    door = Door(kit)
    door.context.sslobject_class = Handshake
    SSLProtocol.max_size = BUFFER
    service, also = Service(kit, jobs, door), beside(jobs) if beside else contextlib.AsyncExitStack()
    try:
        await jobs.open()
        jobs.spawn(service.watch())
        async with listening(service.app(), wanted.listen, door.context) as port, status(jobs, status_port), also:
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
    limits: dict[str, Any] = {"keepalive_timeout": IDLE, "shutdown_timeout": 2.0, "read_bufsize": PIECE}
    runner = web.AppRunner(app, access_log=None, logger=_HTTP, **limits)
    await runner.setup()
    assert runner.server
    limit, loop = HANDSHAKE if context else None, asyncio.get_running_loop()
    place = (runner.server, host.strip("[]") or None)
    try:
        server = await loop.create_server(*place, int(port), backlog=1024, ssl=context, ssl_handshake_timeout=limit)
    except (OSError, ValueError, OverflowError) as cause:
        why = "another program does" if getattr(cause, "errno", None) == errno.EADDRINUSE else cause
        change = "change `listen` in settings.toml" if context else "choose another --status-port"
        raise SettingsError(f"the server cannot listen at '{listen}': {why}; {change}") from cause
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
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    values = {f'jobs{{state="{state}"}}': count for state, count in states.items()}
    values |= {"sites_connected": len(jobs.connected())}
    values |= {"open_tasks": sum(len(job.tasks) for job in jobs.running.values())}
    values |= {"resident_memory_bytes": pages * os.sysconf("SC_PAGE_SIZE")}
    values |= {f'results_total{{verdict="{name}"}}': counts[name] for name in ("accepted", "duplicate", "late")}
    values |= {f"{name}_total": counts[name] for name in ("refused", "bytes_in", "bytes_out", "uploads_resumed")}
    families: dict[str, list[str]] = {}
    for name, value in values.items():
        family = name.partition("{")[0]
        kind = "counter" if family.endswith("_total") else "gauge"
        families.setdefault(family, [f"# TYPE koinon_{family} {kind}"]).append(f"koinon_{name} {value}")
    return "\n".join(line for lines in families.values() for line in lines) + "\n"


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
