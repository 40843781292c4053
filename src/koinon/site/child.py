"""A job's own process: started by a server or a site, which hand it work, and which it never outlives.

Both sides say plain values to each other, one JSON object a line; arrays lie in files.  Nobody else can read the
line, and what the child prints goes into its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from koinon.site import landlock

KEEPS = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
"""What a job sees of the environment; and whatever begins with KOINON_, and its number of threads."""

THREADS = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    *("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "NPROC"),  # NPROC: JAX
)
"""What tells numerical libraries how many threads to take."""

LINE = 1 << 20
"""Bytes of a message, at most."""


@dataclass(frozen=True)
class Limits:
    """What a job's process may take.

    Args:
        memory_gb: address space; None sets no limit.
        cpu_hours: of processor time, all threads together; None sets no limit.
        file_gb: size of a file that it writes; None sets no limit.
        threads: of its numerical libraries; None leaves it to them.
    """

    memory_gb: float | None = None
    cpu_hours: float | None = None
    file_gb: float | None = None
    threads: int | None = None

    def lines(self) -> list[tuple[int, int]]:
        """The limits as the system takes them."""
        wanted = [
            (resource.RLIMIT_AS, self.memory_gb, 1 << 30),
            (resource.RLIMIT_CPU, self.cpu_hours, 3600),
            (resource.RLIMIT_FSIZE, self.file_gb, 1 << 30),
        ]
        return [(which, int(value * unit)) for which, value, unit in wanted if value is not None]


@dataclass
class Child:
    """A running child and the line to it.

    Args:
        module: whose `main()` it runs, which begins with `parent()`.
        folder: where it works, and where `log.txt` goes.
        hidden: files that it may not read, such as a key.
        limits: what it may take.
        hear: called with each message, on a thread of its own; with None at the end, when the process is gone.
    """

    module: str
    folder: Path
    hear: Callable[[dict[str, Any] | None], None]
    hidden: Sequence[Path] = ()
    limits: Limits = field(default_factory=Limits)
    code: int | None = None

    def __post_init__(self) -> None:
        ours, theirs = socket.socketpair()
        rules = {"hidden": [str(path) for path in self.hidden], "limits": self.limits.lines()}
        with theirs, (self.folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module, str(theirs.fileno()), json.dumps(rules)],
                pass_fds=[theirs.fileno()],
                env=environment(self.limits.threads) | {"TMPDIR": str(self._made("tmp"))},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # it and what it starts are ended together
            )
        self.pid = self._process.pid
        self._line, self._lock = ours, threading.Lock()
        threading.Thread(target=self._listen, daemon=True, name=f"child {self.pid}").start()

    def say(self, **message: Any) -> None:
        """Send a message; if the child is gone, `hear` says so."""
        with self._lock, contextlib.suppress(OSError):
            self._line.sendall(json.dumps(message).encode() + b"\n")

    def end(self) -> None:
        """End it, and whatever it has started, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended; its exit status."""
        return self._process.wait(timeout)

    def _made(self, name: str) -> Path:
        (folder := self.folder.resolve() / name).mkdir(exist_ok=True)
        return folder

    def _listen(self) -> None:
        for message in messages(self._line):
            self.hear(message)
        self.end()  # it has hung up, or says what nobody understands
        self.code = self._process.wait()
        self._line.close()
        self.hear(None)


@dataclass(frozen=True)
class Parent:
    """Whoever started this process."""

    line: socket.socket

    def say(self, **message: Any) -> None:
        """Send a message."""
        self.line.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> Iterator[dict[str, Any]]:
        """What it says, until it is gone."""
        return messages(self.line)


def parent() -> Parent:
    """In a child: take on the rules that it was started with, and the line to its parent."""
    rules = json.loads(sys.argv[2])
    for which, most in rules["limits"]:
        resource.setrlimit(which, (most, most))
    landlock.hide([Path(path) for path in rules["hidden"]])
    return Parent(socket.socket(fileno=int(sys.argv[1])))


def messages(line: socket.socket) -> Iterator[dict[str, Any]]:
    """The messages of a line, until it is closed or says something else."""
    with contextlib.suppress(OSError, ValueError), line.makefile("rb") as lines:
        while text := lines.readline(LINE):
            message = json.loads(text)
            if not isinstance(message, dict):
                return
            yield message


def environment(threads: int | None, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """A job's environment: no secrets of whoever started the server or the site."""
    given = os.environ if given is None else given
    kept = {name: value for name, value in given.items() if name in KEEPS or name.startswith("KOINON_")}
    if threads is not None:
        kept |= threading_of(threads)
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "1"}


def threading_of(threads: int) -> dict[str, str]:
    """The environment that gives numerical libraries so many threads."""
    return dict.fromkeys(THREADS, str(threads)) | {"TF_CPP_MIN_LOG_LEVEL": "2"}
