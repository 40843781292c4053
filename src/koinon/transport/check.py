"""`koinon site check`: whether a site could join from here, one thing after another, each with what to do."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from koinon.errors import KoinonError, in_a_line
from koinon.site.certificates import identity
from koinon.site.kit import Kit, SiteSettings, open_kit, owner, settings
from koinon.task.wire import VERSION, understood
from koinon.transport.route import CONNECT, FAULTS, Route, route, said
from koinon.transport.tls import client_context

T = TypeVar("T")

SKEW = 60.0
"""Seconds by which the clocks may differ before it is worth a word."""

LARGEST = 1 << 16
"""Bytes of an answer that are read."""


class Row(NamedTuple):
    """One thing that was looked at: its name, whether it is well, and what was found or is to be done."""

    name: str
    ok: bool
    said: str


def check(folder: str | Path) -> list[Row]:
    """Look at a site's kit, its data, the way to its servers, the clock, the versions and the disk.  Never raises."""
    rows: list[Row] = []
    kit = _try(rows, "kit", partial(open_kit, folder))
    if kit is None:
        return rows
    said = f"{kit.role} '{kit.name}' of '{kit.project}', until {owner(kit).until:%Y-%m-%d}"
    rows.append(Row("kit", kit.role == "site", said if kit.role == "site" else f"it is {said}: take a site's"))
    chosen = _try(rows, "settings", partial(settings, kit, SiteSettings)) or SiteSettings()
    rows += _data(chosen.data)
    for server in kit.servers:
        if way := _try(rows, "address", partial(route, server)):
            rows += _way(kit, way)
    free = shutil.disk_usage(kit.path).free / 1e9
    wanted = f"; settings.toml wants {chosen.disk_gb:g} GB: make room" if free < chosen.disk_gb else ""
    return [*rows, Row("disk", not wanted, f"{free:.1f} GB are free at '{kit.path}'{wanted}")]


def _try(rows: list[Row], name: str, look: Callable[[], T]) -> T | None:
    try:
        return look()
    except (KoinonError, OSError, ValueError) as error:
        rows.append(Row(name, False, in_a_line(error)))
        return None


def _data(named: Mapping[str, str | int | float | bool]) -> Iterator[Row]:
    """Whether the files and folders are there; what is in them only a job will see."""
    paths = [(name, Path(value)) for name, value in named.items() if isinstance(value, str)]
    for name, path in paths:
        if not path.is_absolute():  # `target`, `classes`, and other words for jobs
            if name in ("train", "test"):
                yield Row("data", False, f"{name} = '{path}': give the full path, as a job runs in a folder of its own")
            continue
        try:
            path.stat()
            ok = os.access(path, os.R_OK)
            yield Row("data", ok, f"{name} = '{path}' {'can' if ok else 'cannot'} be read by this user")
        except (FileNotFoundError, NotADirectoryError):
            yield Row("data", False, f"{name} = '{path}' is not there")
        except (OSError, ValueError) as cause:  # a folder that this user may not enter, a file server that is away
            yield Row("data", False, f"{name} = '{path}' cannot be read by this user: {cause}")


def _way(kit: Kit, way: Route) -> Iterator[Row]:
    """From the name of a server, or of the proxy before it, to its clock."""
    host, port = way.first
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        yield Row("name", True, f"{host} is {', '.join(sorted({str(entry[4][0]) for entry in found}))}")
        socket.create_connection(way.first, CONNECT).close()
        yield Row("port", True, f"{host}:{port} is open")
    except OSError as cause:
        yield Row("name" if isinstance(cause, socket.gaierror) else "port", False, said(cause, way))
        return
    line = way.connection(client_context(kit))
    try:
        line.connect()
        if way.proxy:
            yield Row("proxy", True, f"{way.proxy}:{way.proxy_port} lets through to {way.host}:{way.port}")
        server = identity(line.sock.getpeercert(True) or b"")
        line.request("GET", "/v1/version")  # a server of TLS 1.3 says only now whether it takes the certificate
        answer = line.getresponse()
        text = answer.read(LARGEST)
    except (*FAULTS, KoinonError) as cause:
        yield Row("proxy" if "Tunnel" in str(cause) else "TLS", False, said(cause, way))
        return
    finally:
        line.close()
    yield Row("TLS", True, f"server '{server.name}' shows a certificate of this project, until {server.until:%Y-%m-%d}")
    if answer.status not in (200, 404):  # an earlier server has no such place, and says so only to whom it lets in
        yield Row("server", False, f"it refuses this site: {_reason(answer.status, text)}")
    yield _clock(answer.headers)
    yield _version(answer.headers.get("Koinon-Version", ""))


def _reason(status: int, text: bytes) -> str:
    try:
        return " ".join(str(json.loads(text)["error"]).split())
    except (ValueError, KeyError, TypeError):
        return f"it says {status}, and not why; is another server or a proxy in between?"


def _clock(headers: http.client.HTTPMessage) -> Row:
    try:
        seconds = (datetime.now(UTC) - parsedate_to_datetime(headers["Date"])).total_seconds()
    except (TypeError, ValueError):
        return Row("clock", True, "the server does not say what time it is")
    if abs(seconds) > SKEW:
        way = "ahead of" if seconds > 0 else "behind"
        return Row("clock", False, f"this machine's clock is {abs(seconds):.0f} s {way} the server's: set it")
    return Row("clock", True, "as the server's")


def _version(text: str) -> Row:
    ours = ".".join(map(str, VERSION))
    try:
        major, minor = map(int, text.split("."))
        understood((major, minor))
    except ValueError:
        return Row("version", True, f"{ours} here; the server does not say its own")
    except KoinonError as error:
        return Row("version", False, str(error))
    return Row("version", True, f"{ours} here, {text} at the server")
