"""Objects handed to one's own child process: what they are made of by cloudpickle, their arrays in shared memory.

No border is crossed: it is the user's own code and data, on the user's own machine, and a file without a name that
nobody else can open.  The one place besides an old data set's reader where a pickle is read.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import sys
import tempfile
import weakref
from types import ModuleType
from typing import Any, TypeAlias

import cloudpickle
import numpy as np

from koinon.data import Split
from koinon.site import jobfile

Packed: TypeAlias = tuple[bytes, list[tuple[int, int]]]
"""An object without its arrays, and where each of them begins and ends in a box."""


def carried() -> list[ModuleType]:
    """The modules whose definitions travel along, as nobody else could import them: job files, and who was named so."""
    for name, module in tuple(sys.modules.items()):
        if name.startswith(jobfile.PREFIX):
            cloudpickle.register_pickle_by_value(module)
    return [sys.modules[name] for name in cloudpickle.list_registry_pickle_by_value() if name in sys.modules]


class Box:
    """A file without a name, that holds the arrays of one object; who is told its path can read them.

    Args:
        path: of somebody else's box; by default a new one.
    """

    def __init__(self, path: str = "") -> None:
        self.path = path
        if path:
            self._number = os.open(path, os.O_RDWR)
        elif hasattr(os, "memfd_create"):
            self._number = os.memfd_create("koinon")
            self.path = f"/proc/{os.getpid()}/fd/{self._number}"
        else:
            self._number, self.path = tempfile.mkstemp()
            weakref.finalize(self, os.unlink, self.path)
        weakref.finalize(self, os.close, self._number)
        self._map: mmap.mmap | None = None

    def put(self, value: Any) -> Packed:
        """Write an object's arrays here, in place of what was here before."""
        buffers: list[pickle.PickleBuffer] = []
        stream, places, end = io.BytesIO(), [], 0
        _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
        for buffer in buffers:
            places.append((end, end + buffer.raw().nbytes))
            end = -(-places[-1][1] // 64) * 64
        memory = self._memory(end)
        for (start, stop), buffer in zip(places, buffers, strict=True):
            memory[start:stop] = buffer.raw()
        return stream.getvalue(), places

    def get(self, packed: Packed, *, copy: bool = False) -> Any:
        """The object; unless they are copied, its arrays are views of this file, and change with the next `put`."""
        rest, places = packed
        memory = self._memory(max((stop for _, stop in places), default=0))
        views = [memory[start:stop] for start, stop in places]
        return pickle.loads(rest, buffers=[bytearray(view) for view in views] if copy else views)

    def _memory(self, size: int) -> memoryview:
        """So much of the file; it grows, and older views stay valid."""
        if os.fstat(self._number).st_size < size:
            os.ftruncate(self._number, size)
        if size and (self._map is None or len(self._map) < size):
            self._map = mmap.mmap(self._number, os.fstat(self._number).st_size)
        return memoryview(self._map or b"")[:size]


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Memory maps go by their file, a split with what it has read, all other arrays into the box."""

    def reducer_override(self, value: Any) -> Any:
        """How to rebuild a value elsewhere."""
        if isinstance(value, Split):
            return value.reduce()
        if isinstance(value, np.ndarray) and (mapped := _mapped(value)):
            return np.memmap, mapped
        return super().reducer_override(value)


def _mapped(array: np.ndarray) -> tuple[Any, ...] | None:
    """The file, type, mode, offset and shape of an array that is a part of a mapped file."""
    base: Any = array
    while isinstance(base, np.ndarray) and not isinstance(base.base, mmap.mmap):
        base = base.base
    if not isinstance(base, np.memmap) or not base.filename or not array.flags.c_contiguous:
        return None
    start = array.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    return str(base.filename), array.dtype, "r", base.offset + start, array.shape
