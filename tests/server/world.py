"""A federation for the tests of the server: kits, a server in a process of its own, and calls by http.client."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

from koinon.provision import Admin, Project, Server, provision
from koinon.server.__main__ import serve
from koinon.site import bundle
from koinon.site.kit import Kit, open_kit
from koinon.task.wire import Poll, encode
from koinon.transport.process import logging_as, taken
from koinon.transport.tls import client_context

SETTINGS = 'listen = "127.0.0.1:0"\n'
SERVE = "from server import world; world.main()"
TESTS = Path(__file__).parents[1]


class World:
    """A project with kits, and its server.

    Args:
        folder: where all of it lies.
        sites: how many: a, b, c, …
        settings: lines of the server's settings.toml.
    """

    def __init__(self, folder: Path, sites: int = 2, settings: str = "", store: str = "") -> None:
        names = [chr(ord("a") + number) for number in range(sites)]
        roles = {"lead": "lead", "other": "lead", "member": "member", "boss": "project_admin", "local": "org_admin"}
        admins = {name: Admin(role, "East" if name in ("lead", "local") else "") for name, role in roles.items()}
        self.project = Project("hearts", Server(["127.0.0.1:8443"]), sites=dict.fromkeys(names, "North"), admins=admins)
        self.folder, self.sites, self.store = folder, names, store
        provision(self.project, folder)
        (folder / "kits" / "server" / "settings.toml").write_text(SETTINGS + settings)
        self.server: subprocess.Popen[bytes] | None = None
        self.lines: dict[str, http.client.HTTPSConnection] = {}
        self.port = 0

    def kit(self, name: str) -> Kit:
        """Somebody's kit."""
        return open_kit(self.folder / "kits" / name)

    @property
    def run(self) -> Path:
        """Where the server writes."""
        return self.folder / "kits" / "server" / "run"

    @property
    def log(self) -> Path:
        """What it logs."""
        return self.folder / "log.txt"

    def start(self, *options: str, script: str = "") -> float:
        """Start the server; seconds until it serves."""
        began, before = time.monotonic(), self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.server = subprocess.Popen(
                [sys.executable, "-c", f"{script}\n{SERVE}", str(self.folder), self.store, *options],
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait(lambda: b"listens at port" in self.log.read_bytes()[before:] or self.server.poll() is not None)
        found = re.search(rb"listens at port (\d+)", self.log.read_bytes()[before:])
        assert found, self.log.read_text()
        self.port = int(found[1])
        return time.monotonic() - began

    def stop(self, how: int = signal.SIGTERM) -> int:
        """End the server; its exit status."""
        for line in self.lines.values():
            line.close()
        self.lines.clear()
        if self.server is None:
            return 0
        server, self.server = self.server, None
        server.send_signal(how)
        try:
            return server.wait(20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    # -- calls -----------------------------------------------------------------------------------------------

    def line(self, who: str) -> http.client.HTTPSConnection:
        """A new connection."""
        return http.client.HTTPSConnection("127.0.0.1", self.port, context=client_context(self.kit(who)), timeout=30)

    def call(
        self, who: str, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """A call on somebody's kept connection: its status, and what was answered, from JSON if it is JSON."""
        kept = self.lines.pop(who, None)
        try:
            line, response = _asked(kept or self.line(who), method, path, body, headers)
        except (ConnectionError, ssl.SSLEOFError):
            if not kept:
                raise
            line, response = _asked(self.line(who), method, path, body, headers)  # it was idle for too long
        text, self.headers, self.lines[who] = response.read(), response.headers, line
        return response.status, json.loads(text) if response.headers.get_content_type() == "application/json" else text

    def poll(self, who: str, wait: float = 0, **said: Any) -> dict[str, Any]:
        """A site's orders."""
        status, orders = self.call(who, "POST", "/v1/poll", encode(Poll(wait=wait, **said)))
        assert status == 200, orders
        return orders

    def submit(self, who: str = "lead", sites: list[str] | None = None, **settings: Any) -> str:
        """A job's id."""
        status, said = self.call(who, "POST", "/v1/jobs", self.bundle(who, sites, **settings))
        assert status == 200, said
        return said["job"]

    def bundle(
        self, who: str = "lead", sites: list[str] | None = None, everybody: bool = False, **settings: Any
    ) -> bytes:
        """A job for the scripted controller."""
        (file := self.folder / "job.py").write_text("job = None\n")
        texts = {name: str(value) for name, value in settings.items()}
        order = SimpleNamespace(file=str(file), settings=texts, seed=0, rounds=None, fast=False)
        return bundle.pack(order, self.kit(who), sites=None if everybody else sites or self.sites)

    def assigned(self, who: str, **said: Any) -> dict[str, Any]:
        """The next task of a site, as soon as there is one."""
        return wait(lambda: next(iter(self.poll(who, **said)["assignments"]), None))

    def put(self, who: str, task: Mapping[str, Any], data: bytes, offset: Any = 0, **more: Any) -> tuple[int, Any]:
        """Send an answer from there on; more: other parts of the query, headers."""
        headers = more.pop("headers", {})
        query = {"digest": sha(data), "size": len(data), "offset": offset, "seconds": 1.5, "failed": 0} | more
        return self.call(
            who,
            "PUT",
            f"{place_of(task)}?{urlencode(query)}",
            data[offset:] if isinstance(offset, int) else data,
            headers,
        )

    def state(self, job: str, who: str = "boss") -> dict[str, Any]:
        """What the server says of a job."""
        return self.call(who, "GET", f"/v1/jobs/{job}")[1]

    def finished(self, job: str) -> dict[str, Any]:
        """The same, once the job is over."""
        return wait(lambda: said if (said := self.state(job))["state"] not in ("submitted", "running") else None)

    def work(self, who: str, job: str, answer: Callable[[Mapping[str, Any]], bytes] | None = None) -> int:
        """Answer every task of a job until it is over; how many there were."""
        count, held = 0, dict[str, list[str]]()
        while True:
            orders = self.poll(who, wait=1, jobs=[job], holding=held)
            if job in orders["ended"]:
                return count
            held |= {task["job"]: [task["task"]] for task in orders["assignments"] if task["job"] != job}
            for task in (task for task in orders["assignments"] if task["job"] == job):
                status, said = self.put(who, task, answer(task) if answer else f"{who} {task['task']}".encode())
                assert (status, said["verdict"]) == (200, "accepted")
                count += 1


def _asked(
    line: http.client.HTTPSConnection, method: str, path: str, body: Any, headers: Mapping[str, str] | None
) -> tuple[http.client.HTTPSConnection, http.client.HTTPResponse]:
    try:
        line.request(method, path, body, dict(headers or {}))
        return line, line.getresponse()
    except (OSError, http.client.HTTPException):
        line.close()
        raise


def main() -> None:
    """The server's process: with the scripted controller instead of the real one."""
    folder, store, *options = sys.argv[1:]
    logging_as("json" if "json" in options else "text")
    port = next((int(option) for option in options if option.isdigit()), None)
    with taken(Path(folder) / "kits" / "server", "server") as kit:
        asyncio.run(serve(kit, store=store, status_port=port, controller="server.scripted"))


def place_of(task: Mapping[str, Any]) -> str:
    """Where a site's answer to a task goes."""
    return f"/v1/results/{task['job']}/{task['task']}"


def sha(data: bytes) -> str:
    """As the protocol names bytes."""
    return hashlib.sha256(data).hexdigest()


def wait(found: Callable[[], Any], seconds: float = 30) -> Any:
    """What is found, as soon as it is."""
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)
    return value


@contextlib.contextmanager
def running(folder: Path, *options: str, **more: Any) -> Iterator[World]:
    """A world whose server runs."""
    world = World(folder, **more)
    try:
        world.start(*options)
        yield world
    finally:
        world.stop(signal.SIGKILL)
