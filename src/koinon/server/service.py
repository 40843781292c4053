"""The HTTP half of the server: one port, under TLS with certificates on both sides.

POST /v1/poll                    a site asks what to do; kept waiting until there is something to say
GET  /v1/blobs/{digest}          a model or a bundle that one of its tasks names
GET  /v1/results/{job}/{task}    how much of its answer has arrived
PUT  /v1/results/{job}/{task}    the rest of it
POST /v1/renew                   its next certificate
POST /v1/jobs                    an admin hands in a bundle
GET  /v1/version                 what is spoken here, for whoever looks whether the way is open
GET  /v1/jobs, /v1/jobs/{id}, …/files, …/files/{name}, …/events, /v1/sites; POST …/stop
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakKeyDictionary

import msgspec
from aiohttp import web
from sqlalchemy.exc import SQLAlchemyError

from koinon.errors import Refused
from koinon.server.access import Denied, Door, permit, said, stops
from koinon.server.blobs import QUIET, Arrival, Blobs, receive
from koinon.server.jobs import Jobs, room
from koinon.server.store import ACTIVE, Answer, Entry
from koinon.site import bundle, certificates
from koinon.site.kit import Identity, Kit
from koinon.task import Verdict
from koinon.task.errands import DIGEST
from koinon.task.wire import VERSION, Orders, Poll, Receipt, decode, encode, understood

SMALL = 1 << 20
"""Bytes of a call that is no transfer, at most."""

FAILED = 64 << 10
"""Bytes in which a site says why it has no answer, at most."""

PIECE = 1 << 18
"""Bytes of a transfer that are handed on at once."""

WAIT = 25.0
"""Seconds for which a poll is kept waiting, at most."""

LOOK = 0.25
"""Seconds between looks at a growing file that somebody watches."""

SPOKEN = ".".join(map(str, VERSION))
"""The version of what is said here, as text."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_LOG = logging.getLogger("koinon.server")

Handler = Callable[[web.Request, Identity], Awaitable[web.StreamResponse]]


class Failed(msgspec.Struct):
    """What a site says when it has no answer."""

    reason: str
    traceback: str = ""


class Service:
    """What is answered to sites and admins.

    Args:
        kit: the server's.
        jobs: what runs.
        door: who may come in.
    """

    def __init__(self, kit: Kit, jobs: Jobs, door: Door) -> None:
        self._kit, self._jobs, self._door = kit, jobs, door
        self._blobs: Blobs = jobs.store.blobs
        self._uploads: dict[str, tuple[asyncio.Transport, asyncio.Event]] = {}
        self._troubles: dict[str, dict[str, str]] = {}  # by site, then by job: why it cannot go on for now
        self._told: WeakKeyDictionary[asyncio.Transport, str] = WeakKeyDictionary()  # of those who are revoked
        self._revoked = 0.0  # when the list of revoked names changed last

    def app(self) -> web.Application:
        """All of it, for aiohttp to serve."""
        app = web.Application(client_max_size=SMALL)
        for method, path, act, handler in (
            ("POST", "/v1/poll", "work", self._poll),
            ("GET", "/v1/blobs/{digest}", "work", self._blob),
            ("GET", "/v1/results/{job}/{task}", "work", self._result),
            ("PUT", "/v1/results/{job}/{task}", "work", self._upload),
            ("POST", "/v1/renew", "renew", self._renew),
            ("POST", "/v1/jobs", "submit", self._submit),
            ("POST", "/v1/jobs/{id}/stop", "stop", self._stop),
            ("GET", "/v1/jobs", "read", self._list),
            ("GET", "/v1/jobs/{id}", "read", self._job),
            ("GET", "/v1/jobs/{id}/files", "read", self._files),
            ("GET", "/v1/jobs/{id}/files/{name:.+}", "read", self._file),
            ("GET", "/v1/jobs/{id}/events", "read", self._events),
            ("GET", "/v1/sites", "read", self._sites),
            ("GET", "/v1/version", "", self._version),
        ):
            app.router.add_route(method, path, self._guarded(act, handler))
        app.router.add_route("*", "/{other:.*}", self._guarded("", self._unknown))
        app.on_response_prepare.append(_versioned)
        return app

    async def watch(self) -> None:
        """Notice what is new in the kit, for as long as this runs."""
        while True:
            await asyncio.sleep(LOOK)
            before = self._door.revoked.names
            if self._door.refresh():
                self._revoked = time.monotonic()
                for name in (name for name, void in self._door.revoked.names.items() if void != before.get(name)):
                    self._jobs.seen.pop(name, None)  # nobody waits for it any more
                self._jobs.wake()

    # -- every call ------------------------------------------------------------------------------------------

    def _guarded(self, act: str, handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Answer who may ask, and tell the others, and the log, why not."""

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.transport is None:
                raise ConnectionResetError
            try:
                who = self._door.enter(request.transport)
                if act:
                    permit(who, act)
                if who.role == "site" and act:  # whoever only looks takes no part
                    self._jobs.alive(who.name, who.organisation)
                return await handler(request, who)
            except Denied as no:
                return self._denied(request, no)
            except Refused as no:
                return self._denied(request, Denied(422 if act == "submit" else 400, str(no)))
            except web.HTTPException as no:
                return self._denied(request, Denied(no.status, no.reason))
            except ConnectionError:
                raise  # nobody is left to be told
            except TimeoutError:
                return self._denied(request, Denied(408, f"nothing came for {QUIET:g} s", cut=True))
            except (OSError, SQLAlchemyError) as cause:
                full = getattr(cause, "errno", None) in FULL or "is full" in str(cause)
                what = "there is no room on the server's disk" if full else "the server's store cannot be reached"
                _LOG.error("%s: %s", what, cause)
                why = f"{what}: try again later; its operator can see why in its log"
                return self._denied(request, Denied(507 if full else 503, why))

        return answer

    def _denied(self, request: web.Request, no: Denied) -> web.StreamResponse:
        self._jobs.counts["refused"] += 1
        who, asked = self._door.known(request.transport), f"{request.method} {request.raw_path[:200]}"
        _LOG.warning("refused %s of %s: %d, %s", asked, who, no.status, " ".join(str(no).split()))  # one line
        response = web.json_response({"error": str(no)}, status=no.status)
        if no.cut:
            response.force_close()
        return response

    async def _send(self, request: web.Request, path: Path) -> web.StreamResponse:
        """A file, from where it is asked for; asyncio's own way with TLS hands on 16 KiB at once, and is slow."""
        try:
            start = request.http_range.start or 0
        except ValueError as cause:
            raise Denied(416, f"a range is to be asked for as bytes=N-: {cause}") from cause
        with _plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            if not 0 <= start <= size:
                raise Denied(416, f"there are {size} bytes, and none from {start} on")
            response = web.StreamResponse(status=206 if "Range" in request.headers else 200)
            response.content_length, response.content_type = size - start, "application/octet-stream"
            if response.status == 206:
                response.headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            await response.prepare(request)
            file.seek(start)
            while start < size:
                if not (piece := await asyncio.to_thread(file.read, min(PIECE, size - start))):
                    raise ConnectionResetError(f"'{path}' was cut off while it was sent")
                await response.write(piece)
                start += len(piece)
                self._jobs.counts["bytes_out"] += len(piece)
            await response.write_eof()
        return response

    async def _unknown(self, request: web.Request, who: Identity) -> web.StreamResponse:
        raise Denied(404, f"there is nothing at {request.method} {request.path}: is this server of another version?")

    async def _version(self, request: web.Request, who: Identity) -> web.StreamResponse:
        return web.json_response({"version": SPOKEN})

    async def _record(self, who: Identity, act: str, of: str) -> None:
        _LOG.info("%s: %s %s", said(who), act, of)
        by = {"name": who.name, "role": who.role, "organisation": who.organisation}
        await self._jobs.durable(self._jobs.store.record, act, of, **by)

    # -- a site's --------------------------------------------------------------------------------------------

    async def _poll(self, request: web.Request, who: Identity) -> web.StreamResponse:
        poll = decode(await _body(request), Poll)
        understood(poll.version)
        if poll.troubles != self._troubles.get(who.name, {}):
            self._troubles[who.name] = poll.troubles
            if poll.troubles:
                _LOG.warning("site '%s' cannot go on for now: %.999r", who.name, poll.troubles)
            else:
                _LOG.info("site '%s' goes on", who.name)
        began, news = time.monotonic(), self._jobs.news[who.name]
        until = began + min(poll.wait if math.isfinite(poll.wait) else 0, WAIT)
        while True:
            news.clear()
            orders = await self._jobs.orders(who.name, poll)
            left = until - time.monotonic()
            if orders != Orders() or self._revoked > began or left <= 0 or self._jobs.closing:
                break
            with suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), left)
        if not self._door.revoked.refuses(who):  # while it waited
            self._jobs.alive(who.name, who.organisation)
        list_of = self._door.revoked.text
        if request.transport and self._told.get(request.transport) != list_of:
            self._told[request.transport] = list_of
            orders = msgspec.structs.replace(orders, revoked=list_of)
        return _said(orders)

    async def _blob(self, request: web.Request, who: Identity) -> web.StreamResponse:
        digest = request.match_info["digest"]
        if not self._jobs.names(who.name, digest):
            raise Denied(404, f"no task of {said(who)} names the bytes {digest[:64]}")
        return await self._send(request, self._blobs.path(digest))

    async def _result(self, request: web.Request, who: Identity) -> web.StreamResponse:
        answer = self._answer(request, who)
        if verdict := await self._settled(answer):
            return _said(Receipt(answer.size, verdict))
        path = self._blobs.arriving(answer.owner, answer.digest)
        return _said(Receipt(path.stat().st_size if path.exists() else 0))

    async def _upload(self, request: web.Request, who: Identity) -> web.StreamResponse:
        answer, offset, rest = self._answer(request, who), _number(request, "offset"), _length(request)
        if offset + rest > answer.size:
            raise Denied(400, f"{offset} + {rest} bytes are more than the {answer.size} of this answer")
        async with self._turn(answer.owner, request.transport):
            if verdict := await self._settled(answer):
                return _said(Receipt(answer.size, verdict))
            self._roomy(request, rest, who)
            return await self._arrive(request, answer, offset, rest)

    async def _arrive(self, request: web.Request, answer: Answer, offset: int, rest: int) -> web.StreamResponse:
        """Take the rest of an answer in, or as much as comes."""
        path = self._blobs.arriving(answer.owner, answer.digest)
        arrival = await asyncio.to_thread(self._blobs.resumed, path)
        try:
            if arrival.size != offset:
                return _said(Receipt(arrival.size), 409)
            self._jobs.counts["uploads_resumed"] += offset > 0
            await receive(request.content.readany, arrival, rest, partial(self._jobs.moved, answer))
            if arrival.size < answer.size:
                return _said(Receipt(arrival.size))
            found = await asyncio.to_thread(arrival.finish)
        finally:
            self._blobs.paused(arrival)
        try:
            if found != answer.digest:
                raise Denied(422, f"the bytes of '{answer.site}' are others than it announced: they were dropped")
            if answer.failed:
                decode(path.read_bytes(), Failed)
        except Refused as no:
            self._blobs.forget(answer.owner)
            raise Denied(422, str(no)) from no
        verdict = await self._jobs.answer(answer, path)
        _LOG.debug("site '%s' answered '%s' of '%s': %s", answer.site, answer.task, answer.job, verdict)
        return _said(Receipt(answer.size, verdict))

    @asynccontextmanager
    async def _turn(self, owner: str, transport: asyncio.Transport | None) -> AsyncIterator[None]:
        """One upload of an answer at a time: whoever comes later has the newer line, and the other is cut."""
        if transport is None:
            raise ConnectionResetError
        while before := self._uploads.get(owner):
            before[0].abort()
            await before[1].wait()
        self._uploads[owner] = transport, (over := asyncio.Event())
        try:
            yield
        finally:
            del self._uploads[owner]
            over.set()

    def _roomy(self, request: web.Request, rest: int, who: Identity) -> None:
        """On the disk; and in a larger buffer of asyncio for whoever brings much, which saves a quarter of the work."""
        if not room(self._blobs.folder, self._jobs.settings.disk_gb + rest / 1e9):
            raise Denied(507, f"there is no room on the server's disk for the {rest} bytes of '{who.name}'")
        if rest > PIECE and (tls := getattr(request.transport, "_ssl_protocol", None)):
            tls.max_size = PIECE

    async def _settled(self, answer: Answer) -> Verdict | None:
        """What became of an answer before, or would of one that nobody waits for."""
        verdict = await self._jobs.durable(self._jobs.store.verdict, answer)
        if verdict == "unknown":
            raise Denied(404, f"site '{answer.site}' was not asked for '{answer.task}' of '{answer.job}'")
        if verdict != "accepted":
            self._jobs.counts[verdict] += 1
        return None if verdict == "accepted" else verdict

    def _answer(self, request: web.Request, who: Identity) -> Answer:
        """What a call says of an answer."""
        asked, place, size = request.query, request.match_info, _number(request, "size")
        failed, most = asked.get("failed") == "1", int(self._jobs.settings.largest_gb * 1e9)
        if size > (FAILED if failed else most):
            raise Denied(413, f"{size} bytes of '{who.name}' are over the limit of {FAILED if failed else most}")
        if not DIGEST.fullmatch(digest := asked.get("digest", "")):
            raise Denied(400, "an answer is to be named by its SHA-256, in 64 hexadecimal digits")
        seconds = _number(request, "seconds", float) if "seconds" in asked else 0.0
        return Answer(place["job"], place["task"], who.name, digest, size, seconds, failed, time.time())

    async def _renew(self, request: web.Request, who: Identity) -> web.StreamResponse:
        given = self._kit.issuer, await _body(request, FAILED), who, self._door.revoked
        chain = await asyncio.to_thread(certificates.renew, *given)
        await self._record(who, "renewed", "its certificate")
        return web.Response(body=chain, content_type="application/x-pem-file")

    # -- an admin's ------------------------------------------------------------------------------------------

    async def _submit(self, request: web.Request, who: Identity) -> web.StreamResponse:
        rest = _length(request, bundle.LARGEST)
        self._roomy(request, rest, who)
        arrival = Arrival(path := self._blobs.scratch())
        try:
            await receive(request.content.readany, arrival, rest, lambda size: self._jobs.counts.update(bytes_in=size))
            digest = await asyncio.to_thread(arrival.finish)
            found = await asyncio.to_thread(bundle.check, path, self._kit.root.read_bytes(), self._door.revoked)
            if found.owner.name != who.name:
                raise Denied(403, f"{said(who)} handed in a bundle that '{found.owner.name}' signed")
            id, manifest = f"{found.name}-{digest[:12]}", msgspec.to_builtins(found)
            by = (who.name, who.organisation, time.time())
            await self._jobs.submit(Entry(id, found.name, digest, arrival.size, manifest, *by), path)
            await self._record(who, "submitted", id)
        finally:
            arrival.close()
            path.unlink(missing_ok=True)
        return web.json_response({"job": id})

    async def _stop(self, request: web.Request, who: Identity) -> web.StreamResponse:
        stops(who, entry := self._entry(request))
        await self._record(who, "stopped", entry.id)
        await self._jobs.stop(entry.id)
        return web.json_response(_shown(self._jobs.entries[entry.id]))

    async def _list(self, request: web.Request, who: Identity) -> web.StreamResponse:
        return web.json_response([_shown(entry) for entry in self._jobs.entries.values()])

    async def _job(self, request: web.Request, who: Identity) -> web.StreamResponse:
        return web.json_response(_shown(self._entry(request)))

    async def _files(self, request: web.Request, who: Identity) -> web.StreamResponse:
        files = []
        for name, path in self._run_folder(request).items():
            with suppress(FileNotFoundError):  # a job replaces its files at any time
                files.append({"name": name, "size": path.stat().st_size})
        return web.json_response(files)

    async def _file(self, request: web.Request, who: Identity) -> web.StreamResponse:
        name = request.match_info["name"]
        if path := self._run_folder(request).get(name):
            with suppress(FileNotFoundError):
                return await self._send(request, path)
        raise Denied(404, f"the job '{request.match_info['id']}' has no file '{name}'")

    async def _events(self, request: web.Request, who: Identity) -> web.StreamResponse:
        entry, after, until = self._entry(request), _number(request, "after"), time.monotonic() + WAIT
        path = self._jobs.folder / entry.id / "run" / "events.jsonl"
        text = _tail(path, after)
        while not text and entry.state in ACTIVE and time.monotonic() < until and not self._jobs.closing:
            await asyncio.sleep(LOOK)
            entry, text = self._entry(request), _tail(path, after)
        headers = {"Koinon-State": entry.state}
        return web.Response(body=text, content_type="application/jsonl", headers=headers)

    async def _sites(self, request: web.Request, who: Identity) -> web.StreamResponse:
        running, now = list(self._jobs.running.values()), time.time()
        rows = []
        for row in await self._jobs.durable(self._jobs.store.sites):
            name, seen = row["name"], row["seen"]
            if name in self._jobs.seen:
                seen = now - (time.monotonic() - self._jobs.seen[name])
            here = {"connected": name in self._jobs.seen and not self._jobs.silent(name), "last_seen": seen}
            jobs = [job.id for job in running if name in (job.entry.sites or ())]
            trouble = "; ".join(dict.fromkeys(self._troubles.get(name, {}).values()))
            rows.append({"name": name, "organisation": row["organisation"], **here, "jobs": jobs, "trouble": trouble})
        return web.json_response(rows)

    def _entry(self, request: web.Request) -> Entry:
        id = request.match_info["id"]
        if entry := self._jobs.entries.get(id):
            return entry
        raise Denied(404, f"there is no job '{id}': `koinon jobs` lists them")

    def _run_folder(self, request: web.Request) -> dict[str, Path]:
        """The plain files of a job's run folder, by name; what a job's own code has linked there is no file of it."""
        run = self._jobs.folder / self._entry(request).id / "run"
        paths = (Path(folder, name) for folder, _, names in os.walk(run) for name in names)
        return {path.relative_to(run).as_posix(): path for path in sorted(paths) if not path.is_symlink()}


async def _versioned(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Koinon-Version"] = SPOKEN


def _shown(entry: Entry) -> dict[str, Any]:
    names = ("id", "name", "state", "reason", "round", "submitter", "submitted")
    return {name: getattr(entry, name) for name in names}


def _said(message: msgspec.Struct, status: int = 200) -> web.Response:
    return web.Response(body=encode(message), status=status, content_type="application/json")


def _plain(path: Path) -> BinaryIO:
    """A file of a run folder, where a job writes at any time: no link of its making is followed."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")


def _tail(path: Path, after: int) -> bytes:
    """What a growing file holds from there on, up to a piece."""
    with suppress(OSError), _plain(path) as file:
        file.seek(after)
        return file.read(PIECE)
    return b""


def _number(request: web.Request, name: str, kind: Callable[[str], float] = int) -> Any:
    with suppress(ValueError):
        value = kind(request.query.get(name, ""))
        if 0 <= value < 1 << 63:
            return value
    raise Denied(400, f"{name} is to be a number from 0 on, not '{request.query.get(name, '')[:40]}'")


def _length(request: web.Request, most: int | None = None) -> int:
    """How many bytes come, said before they come."""
    length = request.content_length
    if length is None:
        raise Denied(411, "say in Content-Length how many bytes come")
    if most is not None and length > most:
        raise Denied(413, f"{length} bytes are over the limit of {most}")
    return length


async def _body(request: web.Request, most: int = SMALL) -> bytes:
    _length(request, most)
    async with asyncio.timeout(QUIET):
        return await request.read()
