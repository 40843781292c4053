"""An existing training script as an executor: it asks for a model, trains as it always did, and sends what came of it.

The script is a process of its own; `attached` is its end of the line.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from koinon.data.own import Own
from koinon.data.split import packed
from koinon.errors import JobError
from koinon.payload import Payload, codec
from koinon.site.attached import LINE
from koinon.site.child import GRACE, threading_of
from koinon.task import Context, Worker

ALIVE = 8
"""Scripts that a process of a simulation keeps."""

LAST = 20
"""Lines of a script that has died to be quoted."""


@dataclass(frozen=True)
class Script:
    """A Python script that trains: `koinon.receive()` gives it the model, `koinon.send()` takes it back.

    Each site's is started once, with its first task, and lives until the job is over.  A simulation keeps eight in each
    of its processes and starts another anew when its turn comes: what has to outlast a round belongs into `state`.

    Args:
        file: the script, relative to the job file.
        args: of its command line.
        tasks: what it answers.

    Raises:
        JobError: there is no such file.
    """

    file: str
    args: Sequence[str] = ()
    tasks: Collection[str] = ("train",)

    def __post_init__(self) -> None:
        places = [Path(folder, self.file).absolute() for folder in sys.path]  # the job file's folder is among them
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise JobError(f"there is no script '{self.file}' beside the job file: is its name right?")
        vars(self).update(path=found)  # another process may find modules elsewhere

    def initial(self, seed: int) -> None:
        """A script has no model before it runs: give one to the Job."""

    def open(self) -> Worker:
        """Nothing is started before the first task."""
        return _Scripts(self)


class _Scripts:
    """The scripts of one process's sites; first, whose last turn is longest ago."""

    threads: int | None = None

    def __init__(self, script: Script) -> None:
        self.script, self.running = script, dict[str, _Running]()
        weakref.finalize(self, _end, self.running)

    def __call__(self, payload: Payload, context: Context) -> Payload:
        running = self.running.pop(context.site, None)
        if len(self.running) == ALIVE and not running:
            first = next(iter(self.running))
            _end({first: self.running.pop(first)})
        self.running[context.site] = running = running or _Running(self.script, self.threads, context.data)
        try:
            return running.answer(payload, context)
        except BaseException:
            _end({context.site: self.running.pop(context.site)})
            raise


class _Running:
    """One site's script."""

    def __init__(self, script: Script, threads: int | None, data: Any) -> None:
        self.file, self.folder = script.file, TemporaryDirectory(prefix="koinon-")
        own = dict(data.settings) if isinstance(data, Own) else {}
        arrays, about = ({}, {}) if own else packed((data.train, data.test))
        numbers = {name: array for name, array in arrays.items() if array.dtype.kind != "U"}  # text has no wire form
        self._path("data").write_bytes(codec.pack({"own": own, "arrays": numbers, "about": about}))
        self.line, theirs = socket.socketpair()
        said = {LINE: f"{theirs.fileno()}:{self.folder.name}"} | (threading_of(threads) if threads else {})
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, str(vars(script)["path"]), *script.args],
                pass_fds=[theirs.fileno()],
                env=os.environ | said,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        self.said = deque[str](maxlen=LAST)
        self.echo = threading.Thread(target=_echo, args=(self.process.stdout, self.said), daemon=True)
        self.echo.start()

    def answer(self, payload: Payload, context: Context) -> Payload:
        """Hand a task over, and wait."""
        given = {name: getattr(context, name) for name in ("task", "site", "round", "seed", "state")}
        said = {"arrays": payload.arrays, "values": payload.values, **given}
        self._path("task").write_bytes(codec.pack(said))
        heard = b""
        with suppress(OSError):
            self.line.sendall(b".")
            heard = self.line.recv(1)
        if not heard:
            code = self.process.wait(GRACE)
            self.echo.join(GRACE)
            words = "".join(self.said).strip() or "it printed nothing"
            raise JobError(
                f"'{self.file}' ended with exit status {code} before koinon.send(…); its last words:\n{words}"
            )
        sent = codec.unpack(self._path("answer").read_bytes())
        context.state.clear()
        context.state.update(sent["state"])
        return Payload(**sent["payload"])

    def _path(self, name: str) -> Path:
        return Path(self.folder.name, name)


def _echo(lines: IO[str], said: deque[str]) -> None:
    """What a script prints goes where its job prints."""
    with suppress(ValueError, OSError), lines:
        for line in lines:
            said.append(line)
            sys.stderr.write(line)


def _end(scripts: dict[str, _Running]) -> None:
    """Tell them that the job is over; they have some seconds to leave."""
    for one in scripts.values():
        with suppress(OSError):
            one.line.shutdown(socket.SHUT_RDWR)
    for one in scripts.values():
        try:
            one.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
        one.line.close()
        one.folder.cleanup()
    scripts.clear()
