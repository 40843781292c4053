"""The half of the wire that asks: a site's, and an administrator's.

One thing after another over HTTP/1.1 and TLS 1.3, with connections that are kept; whatever is cut off is asked again
and goes on where it stopped.  Only the standard library: a site that waits should weigh nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import select
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BufferedIOBase, FileIO
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import msgspec

from koinon.disk import settle
from koinon.errors import LinkError, Refused
from koinon.task.errands import Answer, file_name
from koinon.task.wire import Orders, Poll, Receipt, decode, encode
from koinon.transport.route import CONNECT, FAULTS, route, said

PIECE = 1 << 18
"""Bytes of a transfer that are in memory at once."""

QUIET = 60.0
"""Seconds after which a transfer that does not move is given up."""

SAID = 16 << 20
"""Bytes of an answer that is no transfer, at most."""

TURNS = 4
"""How often an upload is taken up again at once, when the server has less of it than it was thought to."""


class Denied(Refused):
    """Whoever asks is refused, whatever is asked for."""


class Absent(Refused):
    """There is no such thing at the server."""


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

    def poll(self, poll: Poll) -> Orders:
        """What to do."""
        return decode(self._said("POST", "/v1/poll", encode(poll), timeout=poll.wait + CONNECT), Orders)

    def fetch(self, digest: str, size: int, into: Path) -> None:
        """Bring the bytes of this SHA-256 into a file, which is there when they are complete and on the disk."""
        part = into.with_name(into.name + ".part")
        with part.open("ab+") as file:
            sha, have = hashed(file)
            if have < size:
                with self._asked("GET", f"/v1/blobs/{digest}", headers={"Range": f"bytes={have}-"}) as response:
                    if response.status != 206:  # from the start, whatever was asked for
                        sha, have = hashlib.sha256(), file.truncate(0)
                    have += self._keep(response, file, sha, size - have)
            file.flush()
            os.fsync(file.fileno())
        if have < size:
            raise LinkError(f"{self} broke off after {have} of {size} bytes: it goes on from there")
        if have > size or sha.hexdigest() != digest:
            part.unlink()
            raise LinkError(f"{self} sent other bytes than it announced ({digest[:12]}): they are asked for again")
        part.replace(into)
        settle(into.parent)

    def push(self, answer: Answer, path: Path) -> str:
        """Bring an answer to the server, from where it was cut off; what became of it.

        Raises:
            Refused: the server does not take this answer.  Whom it refuses altogether may be taken again.
        """
        place = f"/v1/results/{answer.job}/{file_name(answer.task)}?digest={answer.digest}&size={answer.size}"
        try:
            for turn in range(TURNS):
                receipt = decode(self._said("GET", place), Receipt)
                if not receipt.verdict:
                    receipt = self._put(place, answer, path, receipt.offset, again=not turn)
                if receipt.verdict:
                    return receipt.verdict
        except Denied as denied:
            raise LinkError(str(denied)) from denied
        except Absent:
            return "unknown"
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
        place = f"/v1/jobs/{quote(job, safe='')}/files/{quote(name)}"
        with self._asked("GET", place) as response, part.open("wb") as file:
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
        while True:
            try:
                line.sock.settimeout(timeout)
                line.request(method, place, body, dict(headers or {}))
                response = line.getresponse()
                break
            except FAULTS as cause:
                line.close()
                if not kept or isinstance(cause, TimeoutError):
                    raise self._broken(cause) from cause
                line, kept = self._open(), False  # it was closed while it was idle
        try:
            self._check(response)
            yield response
        finally:
            self._give(line, response)

    def _put(self, place: str, answer: Answer, path: Path, offset: int, *, again: bool) -> Receipt:
        """Send the rest of an answer; what the server has of it then, which is nothing if other bytes arrived."""
        more = f"&offset={offset}&seconds={answer.seconds:.3f}&failed={int(answer.failed)}"
        with path.open("rb", buffering=0) as file:
            rest = max(0, answer.size - file.seek(offset))
            line, _ = self._take()
            try:
                whole = self._stream(line, place + more, file, rest)
                response = line.getresponse()
            except FAULTS as cause:
                line.close()
                raise self._broken(cause) from cause
        try:
            if response.status == 422 and _digest(path) != answer.digest:
                raise Refused(f"the answer to task '{answer.task}' was changed on this site's disk")
            if response.status != 409 and (response.status != 422 or not again):
                self._check(response)
            text = self._whole(response)
            return Receipt() if response.status == 422 else decode(text, Receipt)
        finally:
            self._give(line, response, keep=whole)

    def _stream(self, line: http.client.HTTPSConnection, place: str, file: FileIO, rest: int) -> bool:
        """Send the rest of a file; False: the server has answered before it was through."""
        buffer = memoryview(bytearray(PIECE))
        line.sock.settimeout(QUIET)
        line.putrequest("PUT", place)
        line.putheader("Content-Length", str(rest))
        line.endheaders()
        while length := file.readinto(buffer):
            if select.select([line.sock], [], [], 0)[0]:
                return False
            try:
                line.send(buffer[:length])
            except TimeoutError:
                raise
            except OSError:  # it may have said why
                return False
            self.sent += length
        return True

    def _keep(self, response: http.client.HTTPResponse, file: BinaryIO, sha: Any, most: int) -> int:
        """Write and hash what comes, while more is coming; how many bytes came, and not much more than `most`."""

        def keep(piece: memoryview) -> None:
            sha.update(piece)
            file.write(piece)

        came, kept = 0, None
        with ThreadPoolExecutor(1) as beside:
            for piece in self._pieces(response):
                if kept:
                    kept.result()
                kept, came = beside.submit(keep, piece), came + len(piece)
                if came > most:
                    break
            if kept:
                kept.result()
        return came

    def _pieces(self, response: http.client.HTTPResponse) -> Iterator[memoryview]:
        """What a response brings, in pieces that are gone with the next but one."""
        buffer, other = (memoryview(bytearray(PIECE)) for _ in range(2))
        try:
            while length := response.readinto(buffer):
                self.received += length
                yield buffer[:length]
                buffer, other = other, buffer
        except FAULTS as cause:
            raise self._broken(cause) from cause
        if response.length:
            raise self._broken(ConnectionResetError())

    def _whole(self, response: http.client.HTTPResponse) -> bytes:
        """What a response brings, if it is not too much."""
        try:
            text = response.read(SAID)
            if len(text) == SAID and response.read(1):
                raise Refused(f"{self} answers with more than {SAID >> 20} MiB where that cannot be needed")
            return text
        except FAULTS as cause:
            raise self._broken(cause) from cause

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
        raise {401: Denied, 403: Denied, 404: Absent}.get(response.status, Refused)(reason)

    def _take(self) -> tuple[http.client.HTTPSConnection, bool]:
        """A connection, and whether it was kept from before."""
        with self._lock:
            line = self._idle.pop() if self._idle else None
        return (line, True) if line else (self._open(), False)

    def _give(self, line: http.client.HTTPSConnection, response: http.client.HTTPResponse, keep: bool = True) -> None:
        whole = response.isclosed() and not response.length and line.sock is not None
        if keep and whole and response.status < 500:
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

    def _broken(self, cause: Exception) -> LinkError:
        return LinkError(said(cause, self.routes[self._at]))

    def _turn(self) -> None:
        """To the next server."""
        self._at = (self._at + 1) % len(self.routes)
        self.close()


def hashed(file: BufferedIOBase) -> tuple[Any, int]:
    """The SHA-256, as far as it goes, of what is in a file; its length.  The file then stands at its end."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256"), file.tell()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
