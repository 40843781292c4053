"""Hands that are processes of this machine, kept for the whole run, with one thread each.

What they share lies in files without a name (`box`), so that whoever dies, nothing is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as connected
from queue import Queue
from typing import Any, cast

from koinon.data import Split
from koinon.errors import JobError, SettingsError
from koinon.payload import Plain
from koinon.simulate.box import Box, Packed, carried
from koinon.simulate.crew import DEPTH, Crew, Gone, Hand
from koinon.simulate.nursery import Nursery
from koinon.simulate.weather import Weather
from koinon.site import Agent, inline
from koinon.site.child import threading_of
from koinon.site.script import Script
from koinon.task import Job
from koinon.transport import Chunk

IMPORTS = {"torch": "koinon.training.torch"}
"""What worker processes have in common with each other once this one has imported a framework that bears a fork;
TensorFlow and JAX do not, and each worker imports them for itself."""

ONE_THREAD = threading_of(1)
"""Cores are shared out among processes, not among threads of each."""

KEPT = {-3: 1 << 25, -1: 1 << 29}
"""M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc, in bytes: memory that was freed stays with the process, so that a
model's arrays are not made of fresh pages for each site."""

HUGE = {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")}
"""Memory in pages of 2 MB, where a system gives these to who asks: a processor that looks up 512 times as few of them
trains some hundredths faster."""


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_memory() -> None:
    """Set that here, where the library is glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for number, value in KEPT.items():
            ctypes.CDLL(None).mallopt(number, value)


@dataclass(frozen=True)
class _Line:
    """A process, what connects it, and the boxes in which it answers in turn: one more than it has chunks at a time."""

    number: int
    connection: Connection
    boxes: dict[str, Box]
    turn: Iterator[str]


@dataclass(frozen=True)
class Here:
    """Virtual sites on this machine.

    Args:
        workers: processes that train, each with one thread; 1 is the caller's alone.  By default one a core, started
            when the run turns out to take longer than some seconds; but the caller's alone for a `koinon.Script`.
        weather: what becomes of the sites meanwhile; by default all are fast and none drops out.
        wait: until the workers are ready, for some seconds; otherwise the run begins without them, to the same bits.
        reproducible: to the same bits as a real federation of the same sites: each is trained for itself, in the loop
            form, with one thread, and their answers are folded in their order.  Slower where sites are many.

    Raises:
        SettingsError: workers < 1.
    """

    workers: int | None = None
    weather: Weather | None = None
    wait: bool = False
    reproducible: bool = False

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise SettingsError(f"workers must be 1 or more, not {self.workers}")

    def crew(self, job: Job, split: Split, seed: int) -> Crew | None:
        """Others to do the work; None if there is one core only."""
        # Another process would start each site's script once more.
        scripts = any(isinstance(executor, Script) for executor in job.executors)
        if self._size == 1 or (scripts and self.workers is None):
            return None
        rounds = getattr(job.controller, "rounds", 1)
        engine, now = Processes(job, split, seed, self._size), self.wait or self.workers is not None
        return Crew(engine, rounds=rounds, at_once=now, wait=self.wait)

    def describe(self) -> dict[str, Plain]:
        """How many processes train, or would if the run were long, and with how many threads each."""
        return {
            "where": "here",
            "workers": self._size,
            "threads": 1,
            "started": "at once" if self.workers else "as needed",
        }

    @property
    def _size(self) -> int:
        return self.workers or cores()


class Processes:
    """An engine of `size` processes."""

    def __init__(self, job: Job, split: Split, seed: int, size: int) -> None:
        self.size = size
        self._setup: Any = (job, split, seed)
        self._home: tuple[Box, Packed] | None = None  # packed with the first process: a short run needs none
        self._nursery: Nursery | None = None
        self._lines: list[_Line] = []
        self._tasks: dict[str, tuple[Box, Packed]] = {}  # by the task's id
        self._under_way: Counter[str] = Counter()  # chunks, by their task's id
        self._task_of: dict[int, str] = {}

    def start(self) -> Hand:
        """One more process; it says itself when it has imported and built what it needs.

        Raises:
            JobError: the job holds something that cannot be handed to another process.
        """
        if self._home is None:
            box = Box()
            carried()  # from now on, in whatever is handed over
            try:
                self._home = box, box.put(self._setup)
            except (TypeError, AttributeError, ValueError) as error:  # among them pickle's own
                raise JobError(f"this job cannot be handed to other processes ({error}): use on=1") from error
        if self._nursery is None or self._nursery.closed:
            self._nursery = Nursery(work, [IMPORTS[name] for name in IMPORTS if name in sys.modules], ONE_THREAD | HUGE)
        number, connection = self._nursery.bear()
        boxes = {box.path: box for box in (Box() for _ in range(DEPTH + 1))}
        self._lines.append(_Line(number, connection, boxes, cycle(boxes)))
        with contextlib.suppress(OSError):  # it died at birth: `hear` will notice
            connection.send((self._home[0].path, self._home[1]))
        return Hand("a worker process", self._lines[-1])

    def give(self, hand: Hand, number: int, chunk: Chunk) -> None:
        """Send a chunk; the task's own arrays are written once, however many chunks it has."""
        task, line = chunk.task.id, hand.handle
        if task not in self._tasks:
            idle = [old for old in self._tasks if not self._under_way[old]]
            box = self._tasks.pop(idle[0])[0] if idle else Box()
            self._tasks[task] = box, box.put((chunk.task, chunk.aggregator))
        self._under_way[task] += 1
        self._task_of[number] = task
        box, packed = self._tasks[task]
        with contextlib.suppress(OSError):
            line.connection.send((number, task, box.path, packed, chunk.sites, chunk.states, next(line.turn)))

    def hear(self, hands: Sequence[Hand], *, wait: bool) -> list[tuple[Hand, Any]]:
        """What the processes say."""
        of = {hand.handle.connection: hand for hand in hands}
        heard: list[tuple[Hand, Any]] = []
        for connection in connected(list(of), None if wait else 0):
            hand = of[connection]
            try:
                said = hand.handle.connection.recv()
            except (EOFError, OSError):
                heard.append((hand, self._gone(hand)))
                continue
            if isinstance(said, int):
                hand.name = f"worker process {said}"
                continue
            if said is not None:
                number, path, packed = said
                self._under_way[self._task_of.pop(number)] -= 1
                said = number, *hand.handle.boxes[path].get(packed, copy=True)
            heard.append((hand, said))
        return heard

    def close(self) -> None:
        """End them all, whatever they do."""
        for line in self._lines:
            line.connection.close()
        if self._nursery:
            self._nursery.close()

    def _gone(self, hand: Hand) -> Gone:
        line: _Line = hand.handle
        code = cast(Nursery, self._nursery).end(line.number)
        for number in hand.has:
            self._under_way[self._task_of.pop(number)] -= 1
        line.connection.close()
        self._lines.remove(line)
        return Gone(f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}")


def work(line: Connection) -> None:
    """What a worker process does, until nobody is there any more who gives it anything to do."""
    line.send(os.getpid())
    keep_memory()
    box, packed = line.recv()
    job, split, seed = Box(box).get(packed)
    agent = Agent(job, split.site, inline(job, threads=1), seed)
    chunks: Queue[Any] = Queue()
    threading.Thread(target=_listen, args=(line, chunks), daemon=True).start()
    boxes: dict[str, Box] = {}
    latest, task, aggregator = "", cast(Any, None), None
    line.send(None)
    while True:
        number, name, box, packed, sites, states, answer = chunks.get()
        for path in (box, answer):
            boxes.setdefault(path, Box(path))
        if name != latest:
            latest, (task, aggregator) = name, boxes[box].get(packed)
        answers = agent.answer(task, sites, states, aggregator)
        line.send((number, answer, boxes[answer].put((answers, states))))


def _listen(line: Connection, chunks: Queue[Any]) -> None:
    """Fetch what is to be done; when whoever gives it is gone, end at once, in the middle of whatever it be."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            chunks.put(line.recv())
    os._exit(1)
