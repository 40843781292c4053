"""CollA's cache: what was decoded or dealt out once is kept, under a key made of the content it came from.

An entry is a folder of .npy files and `entry.json`, which lists them.  It is written under a temporary name and
renamed into place, so that an entry is whole or absent whoever races or is killed.  Entries open as memory maps.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from koinon.data.dataset import Array

Kept: TypeAlias = tuple[dict[str, Array], dict[str, Any]]
"""Named arrays, and plain values that JSON can hold."""

_KINDS = ("columns", "splits", "downloads")


def folder() -> Path:
    """Where the cache lives: $KOINON_CACHE, else $XDG_CACHE_HOME/koinon, else ~/.cache/koinon."""
    if own := os.environ.get("KOINON_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "koinon"


def clear() -> None:
    """Remove all entries and downloads; they are made again when needed."""
    for kind in _KINDS:
        shutil.rmtree(folder() / kind, ignore_errors=True)


def digest(*parts: str | Path | Array) -> str:
    """SHA-256 of texts, of arrays (type, shape and content) and of files' contents, as 64 hexadecimal digits.

    >>> digest("a", "bc") == digest("ab", "c")
    False
    """
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                one = hashlib.file_digest(file, "sha256").digest()
        elif isinstance(part, str):
            one = hashlib.sha256(b"text" + part.encode()).digest()
        else:
            one = hashlib.sha256(f"{part.dtype.str}{part.shape}".encode()).digest()
            whole.update(hashlib.sha256(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data).digest())
        whole.update(one)
    return whole.hexdigest()


def keep(kind: str, key: str, make: Callable[[], Kept]) -> Kept:
    """The entry `key`, made and written if it is absent or unreadable.

    A disk that cannot be written to costs a warning and the speed, nothing else.
    """
    entry = folder() / kind / key
    found = _open(entry)
    if found is not None:
        return found
    made = make()
    try:
        _write(entry, made)
    except OSError as cause:
        warnings.warn(f"nothing was cached in '{entry.parent}': {cause}", RuntimeWarning, stacklevel=2)
        return made
    return _open(entry) or made


def _open(entry: Path) -> Kept | None:
    try:
        listed = json.loads((entry / "entry.json").read_text())
        arrays = {
            name: _map(entry / f"{position}.npy", *form) for position, (name, form) in enumerate(listed["arrays"])
        }
        return arrays, dict(listed["about"])
    except (OSError, ValueError, KeyError, TypeError, EOFError):  # absent or damaged: the same to the caller
        return None


def _map(path: Path, dtype: str, shape: list[int]) -> Array:
    empty = 0 in shape  # an empty array cannot be mapped
    array: Array = np.load(path, mmap_mode=None if empty else "r", allow_pickle=False).view(np.ndarray)
    if array.dtype.str != dtype or list(array.shape) != shape:
        raise ValueError(f"'{path}' is not what its entry lists")
    return array


def _write(entry: Path, made: Kept) -> None:
    arrays, about = made
    entry.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=entry.parent))
    try:
        for position, array in enumerate(arrays.values()):
            np.save(draft / f"{position}.npy", array, allow_pickle=False)
        forms = [(name, (array.dtype.str, array.shape)) for name, array in arrays.items()]
        (draft / "entry.json").write_text(json.dumps({"arrays": forms, "about": about}))
        if entry.exists() and _open(entry) is None:
            shutil.rmtree(entry)
        try:
            draft.rename(entry)
        except OSError:
            if _open(entry) is None:  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
