"""A job's own process: started by a server or a site, which hand it work, and which it never outlives.

Both sides say plain values to each other, one JSON object a line; arrays lie in files.  Nobody else can read the
line, and what the child prints goes into its log.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import queue
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from koinon.site import landlock

KEEPS = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES"),
    *("KOINON_CACHE", "XDG_CACHE_HOME"),
)
"""What a job sees of the environment, besides its number of threads and a folder for what is temporary."""

THREADS = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    *("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "NPROC"),  # NPROC: JAX
)
"""What tells numerical libraries how many threads to take."""

LINE = 1 << 20
"""Bytes of a message, at most."""

GRACE = 5.0
"""Seconds in which a child that has hung up ends by itself."""

ENDS = {
    signal.SIGKILL: "was killed: is memory short?",
    signal.SIGXCPU: "has used up the processor time that it may take (cpu_hours)",
    signal.SIGXFSZ: "wrote a larger file than it may (file_gb)",
}
"""What an exit by a signal means."""

PATH_BEGINS = r"(?:(?<![\w.~+-])|(?<=\\[nrt]|-[A-Z]))"
"""Where a path begins: not within another, but after an escaped end of a line, or an option such as -I."""

PATH_ENDS = r"(?![\w~+-]|\.\w)"
"""Where it ends, or goes on with what lies in it."""

_log = logging.getLogger("koinon.site")


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

    def lines(self) -> list[tuple[int, int, int]]:
        """The limits as the system takes them: which, where it says so, where it does no more."""
        wanted = [
            (resource.RLIMIT_AS, self.memory_gb, 1 << 30, 0),
            (resource.RLIMIT_CPU, self.cpu_hours, 3600, 10),  # the signal before SIGKILL says why
            (resource.RLIMIT_FSIZE, self.file_gb, 1 << 30, 0),
        ]
        return [(which, most := int(value * unit), most + more) for which, value, unit, more in wanted if value]


@dataclass
class Child:
    """A running child and the line to it.

    Args:
        module: whose `main()` it runs, which begins with `parent()`.
        folder: where it works, and where `log.txt` goes.
        hidden: files that it may not read, such as a key.
        fixed: folders that it may read, but not change.
        limits: what it may take.
        hear: called with each message, on a thread of its own; with None at the end, when the process is gone.
    """

    module: str
    folder: Path
    hear: Callable[[dict[str, Any] | None], None]
    hidden: Sequence[Path] = ()
    fixed: Sequence[Path] = ()
    limits: Limits = field(default_factory=Limits)
    code: int | None = None

    def __post_init__(self) -> None:
        (temporary := self.folder.resolve() / "tmp").mkdir(exist_ok=True)
        ours, theirs = socket.socketpair()
        closed = {"hidden": self.hidden, "fixed": self.fixed}
        places = {how: [str(path.resolve()) for path in paths] for how, paths in closed.items()}
        rules = json.dumps({**places, "limits": self.limits.lines()})
        first = [sys.executable, "-I", "-S", landlock.__file__, rules]
        program = [sys.executable, "-P", "-m", self.module]  # -P: not what a job has put into the folder
        with theirs, os.fdopen(self._opened(), "ab") as log:
            self._process = subprocess.Popen(
                [*first, *program, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment(self.limits.threads) | {"TMPDIR": str(temporary)},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # it and what it starts are ended together
            )
        self.pid, self._line = self._process.pid, ours
        self._said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        for work in self._listen, self._speak:
            threading.Thread(target=work, daemon=True, name=f"child {self.pid}").start()

    def say(self, **message: Any) -> None:
        """Send a message, without waiting until it is heard; if the child is gone, `hear` says so."""
        self._said.put(json.dumps(message).encode() + b"\n")

    def end(self) -> None:
        """End it, and whatever it has started, at once."""
        if self.code is None:  # afterwards its number may be somebody else's
            self._kill()

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended; its exit status."""
        return self._process.wait(timeout)

    @property
    def reason(self) -> str:
        """How it has ended, in words."""
        if self.code is None:
            return "is still running"
        with contextlib.suppress(ValueError):
            ended = signal.Signals(-self.code)
            return ENDS.get(ended, f"was ended by the signal {ended.name}")
        return f"ended with exit status {self.code}"

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _opened(self) -> int:
        """Its log, which it may have made into anything: then there is a new one."""
        log, flags = self.folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT
        try:
            return plain(log, flags)
        except OSError:
            remove(log)
            return plain(log, flags)

    def _speak(self) -> None:
        with contextlib.suppress(OSError):
            while (text := self._said.get()) is not None:
                self._line.sendall(text)

    def _listen(self) -> None:
        try:
            for message in messages(self._line):
                self.hear(message)
        except Exception:  # what a job says must not end whoever listens to all jobs
            _log.exception("child %d said what is not understood: it is ended", self.pid)
            self._kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        self._kill()  # what it has started, or itself if it has hung up and stays
        code = self._process.wait()
        self._said.put(None)
        self._line.close()
        self.code = code
        self.hear(None)


class Parent:
    """Whoever started this process; if that ends, so does this, and whatever it has started."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._heard: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True, name="parent").start()

    def say(self, **message: Any) -> None:
        """Send a message."""
        self._line.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> Iterator[dict[str, Any]]:
        """What it says, as long as both live."""
        while True:
            yield self._heard.get()

    def _listen(self) -> None:
        for message in messages(self._line):
            self._heard.put(message)
        os.killpg(os.getpid(), signal.SIGKILL)  # the group that it leads


def plain(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a file in a folder where a job can write, as a descriptor.

    Raises:
        OSError: it is none of its own: a link to another's, or a pipe to wait at.
    """
    at = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    about = os.fstat(at)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1:
        os.close(at)
        raise OSError(errno.ELOOP, "it is no plain file", str(path))
    return at


def last_words(log: Path, lines: int = 1) -> str:
    """The last lines of a log that a job has written, of its last 8 KB."""
    try:
        at = plain(log)
    except OSError as cause:
        return f"its log cannot be read: {cause}"
    with os.fdopen(at, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
        said = file.read().decode(errors="replace").strip()
    return "\n".join(said.splitlines()[-lines:]) or "it said nothing"


def remove(path: Path) -> None:
    """Delete whatever a job has put there, and nothing that it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def parent() -> Parent:
    """In a child: the line to its parent."""
    line = socket.socket(fileno=int(sys.argv[1]))
    line.set_inheritable(False)
    return Parent(line)


def messages(line: socket.socket) -> Iterator[dict[str, Any]]:
    """The messages of a line, until it is closed or says something else."""
    with contextlib.suppress(OSError, ValueError, RecursionError), line.makefile("rb") as lines:
        while text := lines.readline(LINE):
            message = json.loads(text)
            if not isinstance(message, dict):
                return
            yield message


def masking(own: Mapping[str, str], data: Mapping[str, Any]) -> Callable[[str], str]:
    """What makes a text fit to be read elsewhere, by full paths in it.

    Args:
        own: path -> what stands there instead; one that ends with a slash takes it along.
        data: a site's or server's settings of that name: of its files, theirs.

    >>> masking({"/kit": "KIT", "/kit/run/jobs/": ""}, {"train": "/data"})("/kit/run/jobs/1: /kit/x, /kit.old, /data/y")
    '1: KIT/x, /kit.old, [data] train/y'
    """
    names = dict.fromkeys([*sys.path, sys.prefix, sys.base_prefix, os.environ.get("HOME", "")], "…")
    names |= {value: f"[data] {name}" for name, value in data.items() if isinstance(value, str)}
    names = {str(Path(path)): name for path, name in names.items() if Path(path).is_absolute() and Path(path).name}
    names |= {str(Path(path).resolve()): name for path, name in names.items()}
    names |= own
    ends = {path: "" if path.endswith("/") else PATH_ENDS for path in names}
    longest = sorted(names, key=len, reverse=True)
    paths = re.compile(PATH_BEGINS + f"(?:{'|'.join(re.escape(path) + ends[path] for path in longest)})")
    return lambda text: paths.sub(lambda found: names[found[0]], text)


def environment(threads: int | None) -> dict[str, str]:
    """A job's environment: no secrets of whoever started the server or the site."""
    kept = {name: value for name, value in os.environ.items() if name in KEEPS}
    if threads is not None:
        kept |= threading_of(threads)
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "1"}


def threading_of(threads: int) -> dict[str, str]:
    """The environment that gives numerical libraries so many threads."""
    return dict.fromkeys(THREADS, str(threads)) | {"TF_CPP_MIN_LOG_LEVEL": "2"}
