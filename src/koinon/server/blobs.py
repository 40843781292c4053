"""Bytes on disk, named by their SHA-256: payloads, bundles and answers; and what has arrived of those on their way.

    blobs/<digest>          whole and checked, never changed
    partial/<place>-<digest>   what has arrived so far; <place> says of whom and for what

A process may be killed at any moment: what no row of the store names was never there.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from koinon.disk import settle

REMEMBERED = 1000
"""So many cut arrivals are not read again when they go on."""

HELD = 4
"""Pieces of an arrival that wait for the disk, at most, beside those that are being written."""

QUIET = 60.0
"""Seconds after which an arrival that does not move is given up."""


def place(*names: str) -> str:
    """A file name for what these names say, whatever characters they hold."""
    return hashlib.sha256("\0".join(names).encode()).hexdigest()[:32]


def measured(path: Path) -> tuple[str, int]:
    """SHA-256 of a file, as hexadecimal digits, and its size in bytes; from then on it is on the disk.

    Raises:
        OSError: there is none, or it is a link.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return found, file.tell()


class Blobs:
    """The two folders, under one that exists or is made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.partial = folder / "blobs", folder / "partial"
        for made in (self.folder, self.partial):
            made.mkdir(parents=True, exist_ok=True)
        self._cut: dict[Path, tuple[int, hashlib._Hash]] = {}

    def path(self, digest: str) -> Path:
        """Where a blob lies, if it is there."""
        return self.folder / digest

    def arriving(self, owner: str, digest: str) -> Path:
        """Where what arrives is kept until it is whole."""
        return self.partial / f"{owner}-{digest}"

    def scratch(self, data: bytes = b"") -> Path:
        """A new file beside those that arrive; the next start removes it."""
        path = self.partial / f"scratch-{uuid.uuid4().hex}"
        path.write_bytes(data)
        return path

    @contextmanager
    def keeping(self, path: Path, digest: str) -> Iterator[None]:
        """Give synced bytes their lasting name for as long as the block needs to write down that they are wanted.

        When it raises, `path` is as it was; the blob may be there too, and is for `sweep` to remove.
        """
        # It is gone at a second attempt whose first was told too late that it had worked.
        if path.exists():
            with suppress(FileExistsError):  # the same bytes, as the name says
                os.link(path, self.path(digest))
        settle(self.folder)
        yield
        path.unlink(missing_ok=True)

    def forget(self, owner: str) -> None:
        """Remove whatever arrives there."""
        for path in self.partial.glob(f"{owner}-*"):
            path.unlink(missing_ok=True)
            self._cut.pop(path, None)

    def sweep(self, named: Collection[str], owners: Collection[str]) -> int:
        """Remove blobs that nothing names, and arrivals that nobody waits for; how many there were."""
        lost = [path for path in self.folder.iterdir() if path.name not in named]
        lost += [path for path in self.partial.iterdir() if path.name.partition("-")[0] not in owners]
        for path in lost:
            path.unlink()
        return len(lost)

    def resumed(self, path: Path) -> Arrival:
        """Go on with what has arrived there; from nothing, if nothing has."""
        return Arrival(path, self._cut.pop(path, None))

    def paused(self, arrival: Arrival) -> None:
        """Remember how far an arrival came."""
        arrival.close()
        if len(self._cut) >= REMEMBERED:
            self._cut.pop(next(iter(list(self._cut))), None)
        self._cut[arrival.path] = (arrival.size, arrival.hash)


class Arrival:
    """Bytes on their way in: appended to a file, and hashed meanwhile; `known`: its size and hash when it was cut."""

    def __init__(self, path: Path, known: tuple[int, hashlib._Hash] | None = None) -> None:
        self.path, self._file = path, path.open("ab+", buffering=0)
        self.size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        self.hash = known[1] if known and known[0] == self.size else hashlib.file_digest(self._file, "sha256")

    def add(self, pieces: Sequence[bytes]) -> None:
        """Append pieces.

        Raises:
            OSError: there is no room; what was written stays.
        """
        for piece in pieces:
            rest = memoryview(piece)
            while rest.nbytes:
                written = self._file.write(rest)
                self.hash.update(rest[:written])
                self.size += written
                rest = rest[written:]

    def finish(self) -> str:
        """Force it to the disk; its digest."""
        os.fsync(self._file.fileno())
        self.close()
        return self.hash.hexdigest()

    def close(self) -> None:
        """No more will come for now."""
        self._file.close()


async def receive(
    come: Callable[[], Awaitable[bytes]], arrival: Arrival, rest: int, moved: Callable[[int], None]
) -> None:
    """Write what comes while more is coming; should the line stand still, what came is written nevertheless.

    Args:
        come: the next piece; an empty one where the line ends.
        arrival: takes it.
        rest: so many bytes are to come.
        moved: is told how many have come, with each piece.

    Raises:
        ConnectionResetError: the line is cut.
        TimeoutError: nothing has come for `QUIET` seconds.
        OSError: there is no room; what was written stays.
    """
    held: list[bytes] = []
    writing = batch = None

    async def write() -> None:
        nonlocal batch
        while held:
            batch = asyncio.get_running_loop().run_in_executor(None, arrival.add, held.copy())
            held.clear()
            await batch

    try:
        while rest:
            async with asyncio.timeout(QUIET):
                piece = await come()
            if not piece:
                raise ConnectionResetError
            held.append(piece)
            rest -= len(piece)
            moved(len(piece))
            if batch and (batch.done() or len(held) == HELD):
                await batch
            if not writing or writing.done():
                writing = batch = asyncio.create_task(write())
    finally:
        if writing:
            await writing
