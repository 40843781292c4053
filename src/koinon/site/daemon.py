"""A running site: it asks its server what to do, and does it, whatever dies or is cut off meanwhile.

One thread asks; one thread a job does what `koinon.task.errands` says, with a process in which the job's own code
runs.  Nothing here decides what is to be done next.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec

from koinon.errors import KitError, LinkError, Refused
from koinon.site import bundle, certificates, signing
from koinon.site import kit as kits
from koinon.site.child import Child, last_words, masking
from koinon.site.kit import Identity, Kit, SiteSettings
from koinon.site.spool import Spool
from koinon.task.errands import KEPT, Answer, Backoff, Deliver, Discard, Errands, Forget, Step, Work
from koinon.task.wire import Assignment, Orders, Poll

RENEW = 3600.0
"""Seconds between looks at the certificate's date."""

LOOK = 5.0
"""Seconds between looks at a disk that is full."""

WORKER = partial(Child, "koinon.site.worker")

LAST = 20
"""Lines of a dead process's log that its failure quotes."""

LONGEST = 1000
"""Characters of a failure's reason in this site's own log."""

_log = logging.getLogger("koinon.site")


class Way(Protocol):
    """To the server: what a site needs of koinon.transport.http.Link, and how it fails."""

    def poll(self, poll: Poll) -> Orders: ...
    def fetch(self, digest: str, size: int, into: Path) -> None: ...
    def push(self, answer: Answer, path: Path) -> str: ...
    def renew(self, request: bytes) -> bytes: ...
    def refresh(self) -> None: ...


class Process(Protocol):
    """What does a job's tasks: what a site needs of koinon.site.child.Child.

    Its log.txt is in `folder`; `code` is not None any more once it has ended, and `reason` says how.
    """

    folder: Path
    code: int | None

    @property
    def reason(self) -> str: ...
    def say(self, **message: Any) -> None: ...
    def end(self) -> None: ...
    def wait(self) -> int: ...


@dataclass
class Trouble:
    """What does not work: every reason is said once, and then that it works again."""

    again: str
    said: set[str] = field(default_factory=set)
    now: str = ""

    def met(self, reason: Exception) -> None:
        """It does not work."""
        self.now = str(reason)
        if self.now not in self.said:
            _log.warning("%s; it is tried again", reason)
        self.said.add(self.now)

    def over(self) -> None:
        """It works."""
        if self.said:
            _log.info("%s", self.again)
        self.said.clear()
        self.now = ""


@dataclass
class Hosted:
    """A job at this site."""

    job: str
    trouble: Trouble
    child: Process | None = None
    heard: queue.SimpleQueue[dict[str, Any] | None] = field(default_factory=queue.SimpleQueue)
    desk: Path = Path()
    backoff: Backoff = field(default_factory=Backoff)


class Daemon:
    """A site.

    Args:
        kit: who it is.
        settings: what its administrator allows.
        link: how it reaches its server.
        start: what does a job's tasks: a process of its own, or whatever stands in its place.
    """

    def __init__(self, kit: Kit, settings: SiteSettings, link: Way, start: Callable[..., Process] = WORKER) -> None:
        self.kit, self.settings, self.link, self.start = kit, settings, link, start
        self.spool = Spool(kit.run)
        self.errands = Errands(*self.spool.found())
        self.counts = dict.fromkeys(("polls", "done", "failed", "deaths"), 0)
        self.heard_at: float | None = None
        self.unreachable = Trouble("the server answers again")
        self._hosted: dict[str, Hosted] = {}
        self._masked = masking({str(kit.path): "KIT", f"{kit.run / 'jobs'}/": ""}, settings.data)
        self._change, self._stopping = threading.Condition(), threading.Event()
        self._renewed = 0.0

    def run(self) -> None:
        """Until `stop`: then no process of it is left, and what was finished lies in the spool."""
        _log.info("site '%s' of '%s' asks %s", self.kit.name, self.kit.project, ", ".join(self.kit.servers))
        self._staff()
        threading.Thread(target=self._ask_for_ever, daemon=True, name="poll").start()
        self._stopping.wait()
        with self._change:
            children = [here.child for here in self._hosted.values() if here.child]
            self._change.notify_all()
        for child in children:
            child.end()
            child.wait()
        _log.info("site '%s' has stopped", self.kit.name)

    def stop(self) -> None:
        """End `run`; from any thread, or from a signal's handler."""
        self._stopping.set()

    # -- asking ----------------------------------------------------------------------------------------------

    def _ask_for_ever(self) -> None:
        backoff = Backoff()
        while not self._stopping.is_set():
            # Whether the server is there should be known, and said, at once.
            began, wait = time.monotonic(), self.settings.poll if self.heard_at and not self.unreachable.said else 0.0
            try:
                new = self._ask(wait)
                backoff.reset()
                if not new and time.monotonic() - began < wait / 2:  # a server that does not wait is not to be pressed
                    self._pause(min(1.0, wait))
                continue
            except (LinkError, Refused) as reason:
                self.unreachable.met(reason)
            except Exception:
                _log.exception("a fault of Koinon's own; it is tried again")
            self._pause(backoff.wait(random.random()))

    def _ask(self, wait: float) -> bool:
        """Ask once; whether there was anything new."""
        with self._change:
            troubles = {job: self._masked(here.trouble.now) for job, here in self._hosted.items() if here.trouble.now}
            poll = Poll(holding=self.errands.holding, jobs=self.errands.jobs, wait=wait, troubles=troubles)
        orders = self.link.poll(poll)
        with self._change:
            new = self.errands.hear(orders)
            self.counts["polls"] += 1
            if not (self.heard_at or self.unreachable.said):
                _log.info("the server answers")
            self.heard_at = time.time()
            if new or self.unreachable.said:
                self._change.notify_all()
            for here in self._hosted.values():
                if here.child and self.errands.stops(here.job):
                    here.child.end()
        self.unreachable.over()
        self._staff()
        self._shut_out(orders.revoked)
        self._renew()
        return new

    def _pause(self, seconds: float) -> None:
        """Wait; not for longer by any clock, so that a machine that was asleep asks at once."""
        end, wall = time.monotonic() + seconds, time.time() + seconds
        while (left := min(end - time.monotonic(), wall - time.time() + 1)) > 0 and not self._stopping.is_set():
            self._stopping.wait(min(1.0, left))

    def _shut_out(self, text: str) -> None:
        """Keep a newer list of who was revoked."""
        if text:
            try:
                newer = certificates.Revoked.load(text, self.kit.root.read_bytes())
                if newer.issued > kits.revoked(self.kit).issued:
                    signing.put(self.kit.path / "revoked.json", text.encode())
            except (Refused, OSError) as reason:
                _log.warning("the server's list of revoked names is not taken: %s", reason)

    def _renew(self) -> None:
        """Ask for the next certificate in good time before the present one ends."""
        if abs(time.time() - self._renewed) < RENEW:
            return
        self._renewed = time.time()
        try:
            if kits.due(self.kit):
                kits.install(self.kit, self.link.renew(kits.renewal_request(self.kit)))
                self.link.refresh()
                _log.info("the certificate of site '%s' was renewed", self.kit.name)
        except (LinkError, Refused, KitError, OSError) as reason:
            _log.warning("the certificate of site '%s' was not renewed: %s", self.kit.name, reason)

    def _staff(self) -> None:
        """A thread for every job."""
        with self._change:
            for job in self.errands.all_jobs:
                if job not in self._hosted:
                    self._hosted[job] = here = Hosted(job, Trouble(f"job '{job}' goes on"))
                    threading.Thread(target=self._attend, args=(here,), daemon=True, name=job).start()

    # -- a job -----------------------------------------------------------------------------------------------

    def _attend(self, here: Hosted) -> None:
        while step := self._next(here):
            try:
                self._take(here, step)
                here.backoff.reset()
                if not isinstance(step, Forget):  # then it does not go on
                    here.trouble.over()
                continue
            except (LinkError, OSError) as reason:
                if not self.unreachable.said:  # then that was said
                    here.trouble.met(reason)
            except Exception:
                _log.exception("a fault of Koinon's own in job '%s'; it is tried again", here.job)
            with self._change:
                self.errands.postpone(here.job)
                self._change.wait(here.backoff.wait(random.random()))

    def _next(self, here: Hosted) -> Step | None:
        """The next step, as soon as there is one; None: there will be none."""
        with self._change:
            while not self._stopping.is_set():
                room = self.spool.free_gb() >= self.settings.disk_gb
                if step := self.errands.next(here.job, room=room):
                    if isinstance(step, Work):
                        self.errands.begin(here.job, step.asked.task)
                    return step
                if here.job not in self.errands.all_jobs:
                    del self._hosted[here.job]
                    return None
                blocked = not room and self.errands.next(here.job) is not None
                if blocked:
                    least = f"less than {self.settings.disk_gb:g} GB are free at '{self.kit.run}'"
                    here.trouble.met(LinkError(f"{least}: job '{here.job}' waits until there is more"))
                self._change.wait(LOOK if blocked else None)
        return None

    def _take(self, here: Hosted, step: Step) -> None:
        match step:
            case Work(asked, refused):
                try:
                    if refused:
                        raise Refused(refused)
                    self._work(here, asked)
                except Refused as refusal:
                    self._fail(_about(asked), str(refusal))
            case Deliver(answer):
                self._deliver(answer)
            case Discard(task):
                self.spool.discard(here.job, task)
                with self._change:
                    self.errands.discarded(here.job, task)
            case Forget():
                self._forget(here)

    def _forget(self, here: Hosted) -> None:
        self._end(here)
        self.spool.forget(here.job)
        with self._change:
            self.errands.forgotten(here.job)
        _log.info("job '%s' is over", here.job)

    def _deliver(self, answer: Answer) -> None:
        try:
            verdict = self.link.push(answer, self.spool.answer(answer))
        except Refused as reason:
            _log.warning("the answer to task '%s' of job '%s' is not taken: %s", answer.task, answer.job, reason)
            if not answer.failed:  # then the server should at least know why there is none
                self._fail(answer, f"its answer was not taken: {reason}")
                return
            verdict = "malformed"
        _log.info("task '%s' of job '%s': its answer is %s", answer.task, answer.job, verdict)
        self.spool.settle(answer, verdict in KEPT)
        with self._change:
            self.errands.acknowledged(answer)

    # -- work ------------------------------------------------------------------------------------------------

    def _work(self, here: Hosted, asked: Assignment) -> None:
        """Have a task done by the job's process, or say why it has not been done.

        Raises:
            Refused: it cannot be done.
        """
        child, payload = self._ready(here, asked), self._payload(asked)
        answer, state = here.desk / "answer", here.desk / "state"
        with self._change:
            if self.errands.stops(here.job):  # dropped while it was fetched
                self.errands.died(here.job, asked.task)
                return
            task = {"id": asked.task, "name": asked.name, "round": asked.round}
            child.say(task=task, payload=str(payload), answer=str(answer), state=str(state))
        while (heard := here.heard.get()) is not None:
            if "broken" in heard:
                self._end(here)
                self._fail(_about(asked), str(heard["broken"]), str(heard.get("traceback", "")))
                return
            if heard.get("done") == asked.task:
                about = _about(asked, float(heard["seconds"]))
                if heard["failed"] is not None:
                    self._fail(about, str(heard["failed"]), str(heard.get("traceback", "")))
                    return
                try:
                    self._done(self.spool.keep(about, answer, state))
                except Refused:
                    self._end(here)
                    raise
                return
        here.child = None
        with self._change:
            if self._stopping.is_set():
                return
            stopped, given_up = self.errands.stops(here.job), self.errands.died(here.job, asked.task)
        if not stopped:
            self.counts["deaths"] += 1
            _log.warning("the process of job '%s' %s while it worked on '%s'", here.job, child.reason, asked.task)
        if given_up:
            reason = f"the job's process {child.reason}; that was the third time with this task"
            self._fail(_about(asked), reason, last_words(child.folder / "log.txt", LAST))

    def _ready(self, here: Hosted, asked: Assignment) -> Process:
        """The job's process, started if it does not run.

        Raises:
            Refused: this site does not take the job.
        """
        if here.child and here.child.code is None:
            return here.child
        manifest = self._checked(asked)
        who = manifest.owner
        _log.info(
            "job '%s' of %s '%s' of '%s' is taken up (its bundle's SHA-256: %s…)",
            *(asked.job, who.role, who.name, who.organisation, asked.job[-12:]),
        )
        folder = self.spool.job(asked.job)
        bundle.unpack(folder / "bundle.zip", folder / "code")
        here.desk, here.heard = self.spool.desk(asked.job), queue.SimpleQueue()
        limits = self.settings.limits
        data = self.settings.data.values()
        hidden = [path for path in self.kit.path.iterdir() if path.is_file() and str(path) not in data]
        hidden += self.spool.hidden(asked.job)
        fixed = [self.spool.fixed(asked.job)]
        child = self.start(folder / "work", here.heard.put, hidden=hidden, fixed=fixed, limits=limits)
        said = {"job": str(folder / "code"), "manifest": msgspec.to_builtins(manifest), "site": self.kit.name}
        child.say(**said, share=asked.share, data=self.settings.data, threads=limits.threads)
        with self._change:
            here.child = child
        return child

    def _checked(self, asked: Assignment) -> bundle.Manifest:
        """A job's bundle, fetched once, if this site takes it.

        Raises:
            Refused: it does not.
        """
        path = self.spool.job(asked.job) / "bundle.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        if asked.bundle_size > bundle.LARGEST:
            raise Refused(f"site '{self.kit.name}' takes no bundle of {asked.bundle_size:,} bytes")
        if not path.exists():
            self.link.fetch(asked.bundle, asked.bundle_size, path)
        manifest = bundle.check(path, self.kit.root.read_bytes(), kits.revoked(self.kit))
        if asked.job != bundle.job_id(manifest.name, path.read_bytes()):  # the same one again, as if it were new
            raise Refused(f"job '{asked.job}' comes under another name than its bundle's own")
        if manifest.sites is not None and {self.kit.name, self.kit.relay}.isdisjoint(manifest.sites):
            raise Refused(f"job '{asked.job}' is not for site '{self.kit.name}': its submitter names others")
        who = manifest.owner
        if not accepts(self.settings.accept, who):
            said = f"site '{self.kit.name}' takes no jobs of {who.role} '{who.name}' of '{who.organisation}'"
            raise Refused(f"{said}: its administrator sets `accept` in settings.toml")
        return manifest

    def _payload(self, asked: Assignment) -> Path:
        """What a task comes with, fetched once; the last one is kept until another is needed."""
        with self._change:
            path = self.spool.payload(asked, self.errands.payloads(asked.job))
        if not path.exists():
            if self.spool.free_gb() < self.settings.disk_gb + asked.size / 1e9:
                raise LinkError(f"'{path.parent}' has no room for the {asked.size:,} bytes of task '{asked.task}'")
            self.link.fetch(asked.digest, asked.size, path)
        return path

    def _fail(self, about: Answer, reason: str, traceback: str = "") -> None:
        """Answer a task with a failure; the full paths in it are only for this site's own log."""
        reason = reason.encode(errors="replace").decode()  # a log cannot hold half a character
        _log.warning("task '%s' of job '%s' is answered with a failure: %s", about.task, about.job, reason[:LONGEST])
        self._done(self.spool.fail(about, self._masked(reason), self._masked(traceback)))

    def _done(self, answer: Answer) -> None:
        with self._change:
            self.counts["failed" if answer.failed else "done"] += 1
            self.errands.done(answer)

    def _end(self, here: Hosted) -> None:
        """End a job's process."""
        if here.child:
            here.child.end()
            here.child.wait()
            here.child = None


def accepts(accept: Sequence[str], who: Identity) -> bool:
    """Whether a site's settings allow jobs of this submitter: by "*", name, "role:lead" or "organisation:X".

    >>> from datetime import datetime
    >>> ann = Identity("ann", "lead", "North", 1, datetime.min, datetime.max)
    >>> accepts(["role:lead"], ann), accepts(["organisation:South", "bob"], ann)
    (True, False)
    """
    return not {"*", who.name, f"role:{who.role}", f"organisation:{who.organisation}"}.isdisjoint(accept)


def _about(asked: Assignment, seconds: float = 0.0) -> Answer:
    return Answer(asked.job, asked.task, asked.digest, "", 0, seconds, False)
