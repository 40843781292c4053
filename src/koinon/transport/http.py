"""The half of the wire that asks: a site's, and an administrator's.

One thing after another over HTTP/1.1 and TLS 1.3, with connections that are kept; whatever is cut off is asked again
and goes on where it stopped.  Only the standard library: a site that waits should weigh nothing.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment

import msgspec

from koinon.errors import LinkError, Refused, SettingsError
from koinon.task.errands import Answer, file_name
from koinon.task.wire import Orders, Poll, Receipt, decode, encode

PIECE = 1 << 18
"""Bytes of a transfer that are in memory at once."""

CONNECT, QUIET = 30.0, 60.0
"""Seconds after which a server that does not answer at all, or a transfer that does not move, is given up."""

SAID = 16 << 20
"""Bytes of an answer that is no transfer, at most."""

TURNS = 4
"""How often an upload is taken up again at once, when the server has less of it than it was thought to."""

FAULTS = (OSError, http.client.HTTPException)
"""What a broken line raises."""


class Denied(Refused):
    """Whoever asks is refused, whatever is asked for."""


@dataclass(frozen=True)
class Route:
    """How to get to a server: straight, or through a proxy."""

    host: str
    port: int
    proxy: str = ""
    proxy_port: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)

    def connection(self, context: ssl.SSLContext) -> http.client.HTTPSConnection:
        """A connection that is still to be made."""
        if not self.proxy:
            return http.client.HTTPSConnection(self.host, self.port, timeout=CONNECT, context=context)
        line = http.client.HTTPSConnection(self.proxy, self.proxy_port, timeout=CONNECT, context=context)
        line.set_tunnel(self.host, self.port, dict(self.headers))
        return line

    @property
    def first(self) -> tuple[str, int]:
        """Whom to connect to."""
        return (self.proxy, self.proxy_port) if self.proxy else (self.host, self.port)

    def __str__(self) -> str:
        through = f" through the proxy {self.proxy}:{self.proxy_port}" if self.proxy else ""
        return f"{self.host}:{self.port}{through}"


def route(server: str) -> Route:
    """The way to a server of this address, by `https_proxy` and `no_proxy` of the environment.

    Raises:
        SettingsError: one of the addresses is none.
    """
    host, port, _ = _place(server, "https")
    proxies = getproxies_environment()
    proxy = proxies.get("https", "")
    if not proxy or proxy_bypass_environment(f"{host}:{port}", proxies):
        return Route(host, port)
    at, gate, user = _place(proxy if "://" in proxy else f"http://{proxy}", "http")
    headers = {"Proxy-Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"} if user else {}
    return Route(host, port, at, gate, headers)


class Link:
    """A way to the servers of a federation; any number of threads may use it at once.

    Every call raises LinkError where trying again may help, and Refused where it does not.

    Args:
        servers: their addresses, tried in turn.
        context: makes the TLS context; `refresh` asks for another.
    """

    def __init__(self, servers: Sequence[str], context: Callable[[], ssl.SSLContext]) -> None:
        self.routes = [route(server) for server in servers]
        self.sent = self.received = 0
        self._fresh, self._context, self._at = context, context(), 0
        self._idle: list[http.client.HTTPSConnection] = []
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Go on with another certificate."""
        self._context = self._fresh()
        self.close()

    def close(self) -> None:
        """Close what is idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for line in idle:
            line.close()

    # -- a site's --------------------------------------------------------------------------------------------

    def poll(self, holding: Mapping[str, list[str]], jobs: list[str], wait: float) -> Orders:
        """What to do; the server may keep it waiting for so many seconds."""
        poll = Poll(holding=dict(holding), jobs=jobs, wait=wait)
        return decode(self._said("POST", "/v1/poll", encode(poll), timeout=wait + CONNECT), Orders)

    def fetch(self, digest: str, size: int, into: Path) -> None:
        """Bring the bytes of this SHA-256 into a file, which is there when they are complete and on the disk."""
        part = into.with_name(into.name + ".part")
        with part.open("ab+") as file:
            sha, have = hashed(file)
            if have < size:
                with self._asked("GET", f"/v1/blobs/{digest}", headers={"Range": f"bytes={have}-"}) as response:
                    if response.status != 206:  # from the start, whatever was asked for
                        sha, have = hashlib.sha256(), file.truncate(0)
                    for piece in self._pieces(response):
                        if (have := have + len(piece)) > size:
                            break
                        sha.update(piece)
                        file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if have < size:
            raise LinkError(f"{self} broke off after {have} of {size} bytes: it goes on from there")
        if have > size or sha.hexdigest() != digest:
            part.unlink()
            raise LinkError(f"{self} sent other bytes than it announced ({digest[:12]}): they are asked for again")
        part.replace(into)
        sync(into.parent)

    def push(self, answer: Answer, path: Path) -> str:
        """Bring an answer to the server, from where it was cut off; what became of it.

        Raises:
            Refused: the server does not take this answer.  Whom it refuses altogether may be taken again.
        """
        place = f"/v1/results/{answer.job}/{file_name(answer.task)}?digest={answer.digest}&size={answer.size}"
        for _ in range(TURNS):
            try:
                receipt = decode(self._said("GET", place), Receipt)
                if not receipt.verdict:
                    receipt = self._put(place, answer, path, receipt.offset)
            except Denied as denied:
                raise LinkError(str(denied)) from denied
            if receipt.verdict:
                return receipt.verdict
        raise LinkError(f"{self} does not take the answer to task '{answer.task}' as a whole: it is tried again later")

    def renew(self, request: bytes) -> bytes:
        """A new certificate, and its issuer's, for a request signed with the new key (all PEM)."""
        return self._said("POST", "/v1/renew", request)

    # -- an administrator's ----------------------------------------------------------------------------------

    def submit(self, bundle: bytes) -> str:
        """Hand in a job; its id."""
        return str(self._json("POST", "/v1/jobs", bundle)["job"])

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs, as the server describes them."""
        return list(self._json("GET", "/v1/jobs"))

    def job(self, job: str) -> dict[str, Any]:
        """One of them."""
        return dict(self._json("GET", f"/v1/jobs/{quote(job, safe='')}"))

    def stop(self, job: str) -> None:
        """End a job."""
        self._json("POST", f"/v1/jobs/{quote(job, safe='')}/stop", b"")

    def events(self, job: str, after: int) -> tuple[bytes, str]:
        """What a run has said of itself after so many bytes of its events.jsonl, and the job's state."""
        with self._asked("GET", f"/v1/jobs/{quote(job, safe='')}/events?after={after}") as response:
            return self._whole(response), response.headers.get("Koinon-State", "")

    def files(self, job: str) -> list[dict[str, Any]]:
        """The files of its run folder: `name` and `size`."""
        return list(self._json("GET", f"/v1/jobs/{quote(job, safe='')}/files"))

    def file(self, job: str, name: str, into: Path) -> None:
        """Bring one of them here."""
        part = into.with_name(into.name + ".part")
        with self._asked("GET", f"/v1/jobs/{quote(job, safe='')}/files/{quote(name)}") as response:
            with part.open("wb") as file:
                for piece in self._pieces(response):
                    file.write(piece)
        part.replace(into)

    def sites(self) -> list[dict[str, Any]]:
        """Who is of the federation, and when each was last heard of."""
        return list(self._json("GET", "/v1/sites"))

    def __str__(self) -> str:
        return f"the server {self.routes[self._at]}"

    # -- inside ----------------------------------------------------------------------------------------------

    def _json(self, method: str, place: str, body: bytes | None = None) -> Any:
        try:
            return msgspec.json.decode(self._said(method, place, body))
        except msgspec.DecodeError as cause:
            raise Refused(f"{self} says what is no JSON: {cause}") from cause

    def _said(self, method: str, place: str, body: bytes | None = None, *, timeout: float = QUIET) -> bytes:
        with self._asked(method, place, body, timeout=timeout) as response:
            return self._whole(response)

    @contextlib.contextmanager
    def _asked(
        self,
        method: str,
        place: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = QUIET,
    ) -> Iterator[http.client.HTTPResponse]:
        """A response that is no refusal; its connection is kept if it is read to its end."""
        line, kept = self._take()
        try:
            try:
                response = _ask(line, method, place, body, headers or {}, timeout)
            except FAULTS as cause:
                if not kept or isinstance(cause, TimeoutError):
                    raise
                line.close()  # it was closed while it was idle
                line = self._open()
                response = _ask(line, method, place, body, headers or {}, timeout)
        except FAULTS as cause:
            line.close()
            raise LinkError(said(cause, self.routes[self._at])) from cause
        try:
            self._check(response)
            yield response
        finally:
            self._give(line, response)

    def _put(self, place: str, answer: Answer, path: Path, offset: int) -> Receipt:
        """Send the rest of an answer; what the server has of it then."""
        more = f"&offset={offset}&seconds={answer.seconds:.3f}&failed={int(answer.failed)}"
        line, _ = self._take()
        try:
            whole = self._stream(line, place + more, path, offset)
            response = line.getresponse()
        except FAULTS as cause:
            line.close()
            raise LinkError(said(cause, self.routes[self._at])) from cause
        try:
            if response.status == 422 and _digest(path) != answer.digest:
                raise Refused(f"the answer to task '{answer.task}' was changed on this site's disk")
            if response.status not in (409, 422):
                self._check(response)
            text = self._whole(response)
            return Receipt() if response.status == 422 else decode(text, Receipt)
        finally:
            self._give(line, response, keep=whole)

    def _stream(self, line: http.client.HTTPSConnection, place: str, path: Path, offset: int) -> bool:
        """Send a file from there on; False: the server has answered before it was through."""
        buffer = memoryview(bytearray(PIECE))
        line.sock.settimeout(QUIET)
        with path.open("rb", buffering=0) as file:
            rest = max(0, os.fstat(file.fileno()).st_size - file.seek(offset))
            line.putrequest("PUT", place)
            line.putheader("Content-Length", str(rest))
            line.endheaders()
            while length := file.readinto(buffer):
                if select.select([line.sock], [], [], 0)[0]:
                    return False
                try:
                    line.send(buffer[:length])
                except (BrokenPipeError, ConnectionResetError):  # it may have said why
                    return False
                self.sent += length
        return True

    def _pieces(self, response: http.client.HTTPResponse) -> Iterator[memoryview]:
        """What a response brings, in pieces that are gone with the next."""
        buffer = memoryview(bytearray(PIECE))
        try:
            while length := response.readinto(buffer):
                self.received += length
                yield buffer[:length]
        except FAULTS as cause:
            raise LinkError(said(cause, self.routes[self._at])) from cause
        if response.length:
            raise LinkError(said(ConnectionResetError(), self.routes[self._at]))

    def _whole(self, response: http.client.HTTPResponse) -> bytes:
        """What a response brings, if it is not too much."""
        try:
            text = response.read(SAID)
            if len(text) == SAID and response.read(1):
                raise Refused(f"{self} answers with more than {SAID >> 20} MiB where that cannot be needed")
            return text
        except FAULTS as cause:
            raise LinkError(said(cause, self.routes[self._at])) from cause

    def _check(self, response: http.client.HTTPResponse) -> None:
        """Raises LinkError or Refused unless the server did what it was asked to."""
        if response.status < 300:
            return
        reason = f"{self} answered {response.status} {response.reason}"
        with contextlib.suppress(*FAULTS, ValueError, TypeError, KeyError):
            reason = str(json.loads(response.read(1 << 16))["error"])
        if response.status >= 500 or response.status in (408, 429):
            self._turn()
            raise LinkError(reason)
        raise (Denied if response.status in (401, 403) else Refused)(reason)

    def _take(self) -> tuple[http.client.HTTPSConnection, bool]:
        """A connection, and whether it was kept from before."""
        with self._lock:
            line = self._idle.pop() if self._idle else None
        return (line, True) if line else (self._open(), False)

    def _give(self, line: http.client.HTTPSConnection, response: http.client.HTTPResponse, keep: bool = True) -> None:
        if keep and response.isclosed() and not response.length and line.sock is not None:
            with self._lock:
                self._idle.append(line)
        else:
            line.close()

    def _open(self) -> http.client.HTTPSConnection:
        """A connection to the first server that can be reached, beginning with the last that could."""
        reasons: dict[str, None] = {}
        for _ in self.routes:
            place = self.routes[self._at]
            line = place.connection(self._context)
            try:
                line.connect()
                return line
            except FAULTS as cause:
                line.close()
                reasons[said(cause, place)] = None
                self._turn()
        raise LinkError("; ".join(sorted(reasons)))

    def _turn(self) -> None:
        """To the next server."""
        self._at = (self._at + 1) % len(self.routes)
        self.close()


def said(cause: Exception, place: Route) -> str:
    """What happened on the way to a server, and what to do."""
    if isinstance(cause, socket.gaierror):
        return f"the name {place.first[0]} cannot be resolved: check the address, and this machine's name service"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"the certificate of {place} cannot be trusted ({cause.verify_message}): is it this federation's server?"
    if isinstance(cause, ssl.SSLEOFError | ConnectionResetError | BrokenPipeError | http.client.HTTPException):
        return f"the line to {place} was cut"
    if isinstance(cause, ssl.SSLError):
        return f"{place} does not speak TLS with this kit ({cause.reason or cause}): was the kit revoked, or replaced?"
    if isinstance(cause, ConnectionRefusedError):
        return f"nobody listens at {place.first[0]}:{place.first[1]}: is the server running, and is its port open?"
    if isinstance(cause, TimeoutError):
        return f"{place} does not answer: a firewall may be in between, or the line is down"
    if isinstance(cause, OSError) and "Tunnel" in str(cause):
        why = "it wants a name and a password, http://NAME:PASSWORD@HOST:PORT" if "407" in str(cause) else str(cause)
        return f"the proxy {place.proxy}:{place.proxy_port} does not let through to {place.host}:{place.port}: {why}"
    return f"{place} cannot be reached: {os.strerror(cause.errno) if getattr(cause, 'errno', None) else cause}"


def _ask(
    line: http.client.HTTPSConnection,
    method: str,
    place: str,
    body: bytes | None,
    headers: Mapping[str, str],
    timeout: float,
) -> http.client.HTTPResponse:
    line.sock.settimeout(timeout)
    line.request(method, place, body, dict(headers))
    return line.getresponse()


def _place(address: str, scheme: str) -> tuple[str, int, str]:
    """Host, port and NAME:PASSWORD of an address."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or (443 if scheme == "https" else 80)
    except ValueError:
        parts, host, port = urlsplit(""), None, 0
    if parts.scheme != scheme or not host:
        hidden = address.rpartition("@")[2]  # what comes before is a password
        raise SettingsError(f"'{hidden}' is no address such as {scheme}://host:port")
    user = ":".join(unquote(text) for text in (parts.username, parts.password) if text is not None)
    return host, port, user


def hashed(file: BinaryIO) -> tuple[Any, int]:
    """The SHA-256, as far as it goes, of what is in a file; its length.  The file then stands at its end."""
    file.seek(0)
    sha, buffer, length = hashlib.sha256(), memoryview(bytearray(PIECE)), 0
    while got := file.readinto(buffer):  # type: ignore[attr-defined]
        sha.update(buffer[:got])
        length += got
    return sha, length


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return str(hashed(file)[0].hexdigest())


def sync(folder: Path) -> None:
    """What was renamed in a folder survives a crash of the machine."""
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)
