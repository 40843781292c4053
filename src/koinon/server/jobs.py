"""The jobs that run: a board for each, and a process for its controller, which may die and is started again.

What a site answered is in the store before it is on the board, and on the board before it is acknowledged; what the
controller says is in the store before a site hears of it.  So nothing is lost with this process either.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from koinon.errors import KoinonError
from koinon.payload import Payload
from koinon.server.blobs import measured
from koinon.server.store import ACTIVE, Answer, Entry, Posted, Store
from koinon.site import bundle
from koinon.site.child import Child, last_words, masking, remove
from koinon.site.kit import ServerSettings
from koinon.task import Board, Failure, Result, Task, Verdict
from koinon.task.wire import Assignment, Orders, Poll

CONTROLLER = "koinon.server.controller"

DEATHS = 5
"""So often may a controller die without a commit in between."""

TICK = 0.25
"""Seconds between looks at who is silent and what stands still."""

PATIENCE = 30.0
"""Seconds within which a controller that was asked to stop must have done so."""

FAREWELL = 10.0
"""Seconds that a controller's process has to end by itself, when its job is over."""

ANSWERS = "answers"
"""In a job's folder: links to the answers that its process is told of, which can read no other blob."""

_LOG = logging.getLogger("koinon.server")
_HELD = Payload("metrics", {}, {})  # what the board holds of an answer: the answer itself lies in a file
_SAID = Failure("as its file says")

P = ParamSpec("P")
T = TypeVar("T")


class Jobs:
    """All jobs, and what sites are told of them.

    Args:
        store: what must not be forgotten.
        settings: of the server.
        folder: where jobs work.
        hidden: files that no job may read.
        module: what a job's process runs.
    """

    def __init__(
        self,
        store: Store,
        settings: ServerSettings,
        *,
        folder: Path,
        hidden: Sequence[Path] = (),
        module: str = CONTROLLER,
    ) -> None:
        self.store, self.settings, self.folder, self.hidden, self.module = store, settings, folder, hidden, module
        self.entries: dict[str, Entry] = {}
        self.running: dict[str, Running] = {}
        self.seen: dict[str, float] = {}
        self.began = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.closing = False
        self.told: Callable[[str, dict[str, Any]], None] = lambda job, message: None
        """Hears, after this server has heeded it, what each job's process says."""
        self.news: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        """Set whenever there may be something to tell a site."""
        self._thread = ThreadPoolExecutor(1, "store")
        self._tasks: set[asyncio.Task[None]] = set()

    async def durable(self, call: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
        """A call of the store, on the one thread that has it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: call(*given, **named))

    async def open(self) -> None:
        """Go on with what ran when the last server ended."""
        self.entries = {entry.id: entry for entry in await self.durable(self.store.jobs)}
        for id, entry in self.entries.items():
            if entry.state not in ACTIVE:  # it may have been killed before it had tidied up
                remove(self.folder / id / ANSWERS)
        await self.admit()
        self.spawn(self._watch())

    async def close(self) -> None:
        """End all processes; the jobs go on with the next start."""
        self.closing = True
        self.wake()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._thread.shutdown()
        self.store.close()

    def spawn(self, work: Any) -> None:
        """Do something meanwhile; a failure of it is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def submit(self, entry: Entry, arrived: Path) -> None:
        """Take a job in; the same bundle again is the same job."""
        if await self.durable(self.store.submit, entry, arrived):
            self.entries[entry.id] = entry
        await self.admit()

    async def admit(self) -> None:
        """Begin with the jobs whose turn it is, as long as there is room for them and somebody takes part."""
        waiting = [entry for entry in self.entries.values() if entry.state in ACTIVE and entry.id not in self.running]
        for entry in sorted(waiting, key=lambda entry: entry.state == "submitted"):
            sites = entry.sites or entry.manifest.get("sites") or self.settings.sites or self.connected()
            if len(self.running) < self.settings.jobs_at_once and sites and entry.id not in self.running:
                self.entries[entry.id] = replace(entry, sites=list(sites))
                self.running[entry.id] = job = Running(self, entry.id)
                self.spawn(job.live())

    async def stop(self, id: str) -> None:
        """End a job, though not at once: its controller comes to a stop by itself."""
        entry, job = self.entries[id], self.running.get(id)
        if entry.state not in ACTIVE:
            return
        await self.change(id, stopping=True)
        if job is None:
            await self.change(id, state="stopped", reason="on demand")
        else:
            job.say(stop=True)
            asyncio.get_running_loop().call_later(PATIENCE, job.end)

    async def change(self, id: str, **changes: Any) -> None:
        """Something becomes of a job; when it is over, its sites are told."""
        await self.durable(self.store.update, id, **changes)
        self.entries[id] = entry = replace(self.entries[id], **changes)
        if entry.state not in ACTIVE:
            self.running.pop(id, None)
            self.wake(entry.sites or ())
            _LOG.info("job '%s' is %s%s", id, entry.state, f": {entry.reason}" if entry.reason else "")
            self.spawn(self.admit())

    # -- the sites -------------------------------------------------------------------------------------------

    def alive(self, site: str, organisation: str) -> None:
        """A site has said something."""
        before, self.seen[site] = self.seen.get(site), time.monotonic()
        if before is None:
            _LOG.info("site '%s' is here", site)
            self.spawn(self.durable(self.store.saw, site, organisation))
            self.spawn(self.admit())
        elif self.seen[site] - before > self.settings.silence:
            _LOG.info("site '%s' is back", site)

    def silent(self, site: str) -> bool:
        """Whether a site has said nothing for too long."""
        return time.monotonic() - self.seen.get(site, self.began) > self.settings.silence

    def connected(self) -> list[str]:
        """Who has been heard of lately."""
        return sorted(site for site in self.seen if not self.silent(site))

    def wake(self, sites: Collection[str] | None = None) -> None:
        """There may be something to tell these, or all."""
        for site in self.news if sites is None else sites:
            self.news[site].set()

    async def orders(self, site: str, poll: Poll) -> Orders:
        """What a site should do now, by what it holds."""
        assignments, dropped, now = list[Assignment](), dict[str, list[str]](), time.monotonic()
        for id, job in list(self.running.items()):
            held = poll.holding.get(id, [])
            assignments += job.assigned(site, held, now)
            if unwanted := await job.unwanted(site, held, now):
                dropped[id] = unwanted
        active = {id for id, entry in self.entries.items() if entry.state in ACTIVE}
        return Orders(assignments, dropped, sorted({*poll.jobs, *poll.holding} - active))

    def names(self, site: str, digest: str) -> bool:
        """Whether an open task of this site needs these bytes."""
        return any(
            site in task.sites and digest in (task.digest, job.entry.bundle)
            for job in self.running.values()
            for task in job.tasks.values()
        )

    def moved(self, answer: Answer, size: int) -> None:
        """So many of an answer's bytes have come: its site does not stand still."""
        self.counts["bytes_in"] += size
        self.seen[answer.site] = now = time.monotonic()
        if (job := self.running.get(answer.job)) and (answer.task, answer.site) in job.since:
            job.since[answer.task, answer.site] = now

    async def answer(self, answer: Answer, arrived: Path) -> Verdict:
        """Take an answer whose bytes are on the disk: what became of it, which is durable then."""
        verdict = await self.durable(self.store.accept, answer, arrived)
        self.counts[verdict] += 1
        if verdict == "accepted" and (job := self.running.get(answer.job)):
            job.answered(answer)
        return verdict

    # -- inside ----------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            for job in list(self.running.values()):
                job.tell_silent()
                try:
                    await job.give_up(time.monotonic() - self.settings.standstill)
                except (OSError, SQLAlchemyError) as cause:
                    _LOG.error("%s", cause)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not self.closing:
            _LOG.error("something went wrong in the server", exc_info=error)


class Running:
    """One of them: its board, and the process of its controller."""

    def __init__(self, jobs: Jobs, id: str) -> None:
        self.id, self.since, self.folder = id, dict[tuple[str, str], float](), jobs.folder / id
        self._answers = self.folder / ANSWERS
        own = {str(jobs.folder.parents[1]): "KIT", f"{jobs.folder}/": "", f"{self.folder / 'bundle'}/": ""}
        self._masked = masking(own, jobs.settings.data)
        self._jobs, self._store, self._board = jobs, jobs.store, Board(lease=jobs.settings.silence)
        self.tasks: dict[str, Posted] = {}  # on the board, by key
        self._posted: set[str] = set()  # those that this controller has posted, not one that died
        self._child: Child | None = None
        self._silent, self._deaths, self._ready = list[str](), 0, False

    @property
    def entry(self) -> Entry:
        """The job as the store knows it."""
        return self._jobs.entries[self.id]

    # -- its controller --------------------------------------------------------------------------------------

    async def live(self) -> None:
        """Run the controller, as often as it takes, until the job is over."""
        while self.entry.state in ACTIVE:
            try:
                await self._prepare()
                await self._controller()
            except KoinonError as error:
                await self._insist({"state": "failed", "reason": f"the server cannot run it: {error}"})
            except (OSError, SQLAlchemyError) as cause:
                _LOG.error("job '%s' has to wait: %s", self.id, cause)
                await asyncio.sleep(1)
        self._clear()

    def say(self, **message: Any) -> None:
        """To the controller, without waiting for it to listen; a new one is told everything anew."""
        if self._child:
            self._child.say(**message)

    def end(self) -> None:
        """End the controller's process; if the job is not over, another goes on."""
        if self._child:
            self._child.end()

    async def _prepare(self) -> None:
        """Its folder, and the board as the store knows it."""
        self._clear()
        self._answers.mkdir(parents=True)
        await asyncio.to_thread(bundle.unpack, self._store.blobs.path(self.entry.bundle), self.folder / "bundle")
        await self._jobs.change(self.id, state="running", sites=self.entry.sites)
        board = Board(lease=self._jobs.settings.silence)
        tasks = {task.key: task for task in await self._jobs.durable(self._store.tasks, self.id)}
        answers = await self._jobs.durable(self._store.answers, self.id)
        for task in tasks.values():
            board.post(Task(task.key, task.name, task.round, _HELD, tuple(task.sites)))
        self._board, self.tasks, self._posted, self._ready = board, tasks, set(), True
        for answer in answers:
            self._put(answer)
        self._jobs.wake(self.entry.sites)

    async def _controller(self) -> None:
        """One life of the controller's process."""
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()

        def hear(message: dict[str, Any] | None) -> None:
            with contextlib.suppress(RuntimeError):  # this server has ended
                loop.call_soon_threadsafe(heard.put_nowait, message)

        self._silent = []
        others = [path for path in self.folder.parent.iterdir() if path != self.folder]
        # What is not there yet stands for the folders of jobs to come.
        others += [self.folder.parent / "others", self._store.blobs.folder, self._store.blobs.partial]
        self._child = child = Child(self._jobs.module, self.folder, hear, hidden=[*self._jobs.hidden, *others])
        settings, places = self._jobs.settings, {"job": str(self.folder / "bundle"), "run": str(self.folder / "run")}
        given = {"manifest": self.entry.manifest, "sites": self.entry.sites, "data": settings.data}
        self.say(**places, **given, round=settings.round)
        if self.entry.stopping:
            self.say(stop=True)
        try:
            while (message := await heard.get()) is not None:
                if self.entry.state in ACTIVE:
                    await self._insist(message)
                    if self.entry.state not in ACTIVE:
                        loop.call_later(FAREWELL, child.end)
        finally:
            child.end()
            await asyncio.to_thread(child.wait)
        if self.entry.state in ACTIVE:
            await self._died(child.wait())

    async def _died(self, code: int) -> None:
        """The controller's process is gone before the job was over."""
        if self.entry.stopping:
            await self._insist({"state": "stopped", "reason": "on demand"})
            return
        self._deaths += room(self.folder, self._jobs.settings.disk_gb)
        last = last_words(self.folder / "log.txt")
        _LOG.warning("the controller of '%s' ended with exit status %s: %s", self.id, code, last)
        if self._deaths >= DEATHS:
            why = f"its controller died {DEATHS} times in one round, last with exit status {code}: {last}"
            await self._insist({"state": "failed", "reason": why})
        else:
            await asyncio.sleep(0.1 * 2**self._deaths)

    async def _insist(self, message: dict[str, Any]) -> None:
        """Do what the controller says, and again until the disk and the database allow it."""
        while True:
            if (said := str(message.get("reason", ""))) != (reason := self._masked(said)):  # submitters read it
                _LOG.info("job '%s': %s", self.id, said)
                message = message | {"reason": reason}
            try:
                await self._heed(message)
                return self._jobs.told(self.id, message)
            except (FileNotFoundError, KeyError, TypeError, ValueError) as cause:
                message = {"state": "failed", "reason": f"its controller says what makes no sense: {cause!r}"}
            except (OSError, SQLAlchemyError) as cause:
                _LOG.error("job '%s' has to wait: %s", self.id, cause)
                await asyncio.sleep(1)

    async def _heed(self, message: dict[str, Any]) -> None:
        match message:
            case {"post": dict(asked)}:
                await self._post(asked)
            case {"close": str(id)}:
                await self._close(lambda task: task.id == id)
                self.say(closed=id)  # after all that was acknowledged before
            case {"committed": int(round)}:  # of a controller that died before it could close them, too
                await self._close(lambda task: task.key not in self._posted and task.round <= round)
                await self._jobs.durable(self._store.committed, self.id, round)
                self._jobs.entries[self.id] = replace(self.entry, round=round)
                self._deaths = 0
                _LOG.info("job '%s' committed round %d", self.id, round)
            case {"state": "finished" | "failed" | "stopped" as state, **more}:
                await self._jobs.change(self.id, state=state, reason=str(more.get("reason", "")))
            case {"ready": _} | {"done": _}:
                pass  # at a relay, for its other half
            case _:
                raise ValueError(f"{message!r:.200}")

    async def _post(self, task: dict[str, Any]) -> None:
        path = Path(task["payload"])
        if path.is_symlink() or path.resolve().parent != (self.folder / "run").resolve():
            raise ValueError(f"'{path}' does not lie in the job's own folder")
        digest, size = await asyncio.to_thread(measured, path)
        posted = Posted(
            *(self.id, str(task["id"]), str(task["name"]), int(task["round"]), digest, size),
            sites=[str(site) for site in task["sites"]],
        )
        answers = await self._jobs.durable(self._store.post, posted, path)
        for old in [one for one in self.tasks.values() if one.id == posted.id and one.key != posted.key]:
            self._board.close(self.tasks.pop(old.key).key)
        self._posted.add(posted.key)
        if posted.key not in self.tasks:
            self.tasks[posted.key] = posted
            self._board.post(Task(posted.key, posted.name, posted.round, _HELD, tuple(posted.sites)))
        for answer in answers:
            self.answered(answer)
        self._jobs.wake(posted.sites)

    async def _close(self, wanted: Callable[[Posted], bool]) -> None:
        for task in [task for task in self.tasks.values() if wanted(task)]:
            await self._jobs.durable(self._store.close_task, task)
            self._board.close(task.key)
            del self.tasks[task.key]
            for site in task.sites:
                self.since.pop((task.key, site), None)
            self._jobs.wake(task.sites)

    def _clear(self) -> None:
        """Let go of the answers that no controller has read."""
        with contextlib.suppress(OSError):
            remove(self._answers)

    # -- its sites -------------------------------------------------------------------------------------------

    def assigned(self, site: str, held: Collection[str], now: float) -> list[Assignment]:
        """What a site should work on beside what it holds."""
        found, size, taken = list[Assignment](), self.entry.size, set(held)
        while pulled := self._board.pull(site, now, taken):
            task = self.tasks[pulled.id]
            taken.add(task.key)
            self.since.setdefault((task.key, site), now)
            names = (self.id, task.key, task.name, task.round, task.digest, task.size)
            found.append(Assignment(*names, self.entry.bundle, size, self._share(site)))
        return found

    def _share(self, site: str) -> list[int]:
        """Which of how many sites it is; a relay knows of its own group only."""
        sites = self.entry.sites or []
        return [sites.index(site), len(sites)] if self._jobs.module == CONTROLLER else []

    async def unwanted(self, site: str, held: Collection[str], now: float) -> list[str]:
        """What a site holds and nobody waits for; what it has answered it will hear of when it asks."""
        if not self._ready:
            return []
        doubtful = []
        for key in held:
            others = self._board.tasks.keys() - {key}
            # Its lease may have ended, or this server was started anew: the task is its own again.
            if self._board.touch(site, key, now) or self._board.pull(site, now, others):
                self.since.setdefault((key, site), now)
            else:
                doubtful.append(key)
        if not doubtful:
            return []
        answered = await self._jobs.durable(self._store.answered, self.id, site, doubtful)
        return [key for key in doubtful if key not in answered]

    def answered(self, answer: Answer) -> None:
        """An answer is in the store: it goes onto the board, and to the controller."""
        self._put(answer)
        if task := self.tasks.get(answer.task):
            path = self._answers / f"{answer.owner}-{answer.digest}"
            try:
                if not path.exists():
                    os.link(self._store.blobs.path(answer.digest), path)
            except OSError as cause:
                _LOG.error("job '%s' begins anew, as its controller cannot be given an answer: %s", self.id, cause)
                self.end()
                return
            told = {"path": str(path), "seconds": answer.seconds, "failed": answer.failed, "at": answer.at}
            self.say(result=task.id, site=answer.site, **told)

    def _put(self, answer: Answer) -> None:
        self.since.pop((answer.task, answer.site), None)
        failure, payload = (_SAID, None) if answer.failed else (None, _HELD)
        self._board.answer(Result(answer.task, answer.site, payload, failure), time.monotonic())
        if answer.task in self._board.tasks:
            self._board.take(answer.task)

    def tell_silent(self) -> None:
        """Tell the controller who is silent, whenever that has changed and it can have an open ear."""
        silent = [site for site in self.entry.sites or () if self._jobs.silent(site)]
        if self._posted and silent != self._silent:
            self._silent = silent
            self.say(silent=silent)

    async def give_up(self, since: float) -> None:
        """Answer in the place of sites that have worked on a task without a sign of progress since then."""
        for (key, site), last in list(self.since.items()):
            if last > since or key not in self.tasks:
                continue
            why = f"site '{site}' had it for {self._jobs.settings.standstill:g} s without an answer"
            path = self._store.blobs.scratch(msgspec.json.encode({"reason": why, "traceback": ""}))
            digest, size = await asyncio.to_thread(measured, path)
            answer = Answer(self.id, key, site, digest, size, 0.0, True, time.time(), given_up=True)
            _LOG.warning("task '%s' of '%s' failed: %s", key, self.id, why)
            await self._jobs.answer(answer, path)
            self.since.pop((key, site), None)
            self._jobs.wake([site])


def room(folder: Path, disk_gb: float) -> bool:
    """Whether more than so much of the disk is free."""
    return shutil.disk_usage(folder).free > disk_gb * 1e9
