"""What arrives is written, however fast the disk is and however its line ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from koinon.server.blobs import HELD, Arrival, receive


class Slow(Arrival):
    """On a disk that takes nothing until it is told to."""

    def __init__(self, path: Path, *, full: bool = False) -> None:
        super().__init__(path)
        self.asked, self.free, self.full = threading.Event(), threading.Event(), full

    def add(self, pieces: Sequence[bytes]) -> None:
        """Wait, then write, or not."""
        self.asked.set()
        self.free.wait()
        if self.full:
            raise OSError("no space left")
        super().add(pieces)


def test_what_came_while_the_disk_was_busy_is_written_though_the_line_stands_still(tmp_path: Path):
    """Its site asks over another one how much is there, and is not told less for a minute."""
    arrival, counted = Slow(tmp_path / "arrival"), []

    async def run() -> None:
        pieces: asyncio.Queue[bytes] = asyncio.Queue()
        receiving = asyncio.create_task(receive(pieces.get, arrival, 30, counted.append))
        pieces.put_nowait(b"a" * 10)
        await asyncio.to_thread(arrival.asked.wait)
        pieces.put_nowait(b"b" * 10)
        while len(counted) < 2:
            await asyncio.sleep(0)
        arrival.free.set()
        async with asyncio.timeout(30):
            while arrival.path.stat().st_size < 20:
                await asyncio.sleep(0.01)
        pieces.put_nowait(b"")
        with pytest.raises(ConnectionResetError):
            await receiving

    asyncio.run(run())
    arrival.close()
    assert (arrival.path.read_bytes(), counted) == (b"a" * 10 + b"b" * 10, [10, 10])


def test_only_so_many_pieces_wait_for_the_disk_and_a_full_one_ends_it(tmp_path: Path):
    """Whoever sends faster than the disk writes waits; for a disk that takes no more, nobody does."""
    arrival, counted = Slow(tmp_path / "arrival", full=True), []

    async def run() -> None:
        async def come() -> bytes:
            return bytes(10)

        receiving = asyncio.create_task(receive(come, arrival, 1000, counted.append))
        await asyncio.to_thread(arrival.asked.wait)
        for _ in range(100):
            await asyncio.sleep(0)
        arrival.free.set()
        with pytest.raises(OSError, match="no space"):
            await receiving

    asyncio.run(run())
    arrival.close()
    assert len(counted) <= 2 * HELD
