"""What went wrong, to whom, and what to do: every error that Koinon raises on purpose.

KoinonError
 ├── SettingsError      a setting is unknown, of the wrong type or outside its domain
 ├── DataError          data are missing, corrupt, or cannot be dealt out as asked
 ├── MissingExtra       an optional library is not installed
 ├── JobError           the parts of a job do not fit together
 │    └── FilterMismatch    an aggregator and a filter exclude each other
 ├── PayloadError       bytes or arrays that may not cross a border
 ├── QuorumNotReached   too few sites answered a task
 ├── RunError           a run folder is missing, taken, or belongs to another job
 ├── KitError           a kit was changed, has expired, or lacks something
 ├── LinkError          the server cannot be reached; trying again may help
 └── Refused            the server, or a site, does not take what it was given

The command line prints the message alone; `--debug` adds the traceback.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable
from types import ModuleType


class KoinonError(Exception):
    """The root of the tree: catch it to catch everything Koinon raises on purpose."""


class SettingsError(KoinonError):
    """A setting is unknown, of the wrong type or outside its domain."""


class DataError(KoinonError):
    """Data are missing, corrupt, or cannot be dealt out as asked."""


class MissingExtra(KoinonError):
    """An optional library is not installed."""


class JobError(KoinonError):
    """The parts of a job do not fit together."""


class FilterMismatch(JobError):
    """An aggregator needs to see what a filter hides."""


class PayloadError(KoinonError):
    """Bytes or arrays that may not cross a border."""


class QuorumNotReached(KoinonError):
    """Too few sites answered a task.  `traceback` is the first failing site's, as text."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class RunError(KoinonError):
    """A run folder is missing, taken, or belongs to another job."""


class KitError(KoinonError):
    """A kit was changed, has expired, or lacks something."""


class LinkError(KoinonError):
    """The server cannot be reached just now; trying again may help."""


class Refused(KoinonError):
    """The server, or a site, does not take what it was given; trying again does not help."""


EXTRAS = {
    "torch": ["torch"],
    "jax": ["jax"],
    "keras": ["tensorflow"],
    "data": ["sklearn", "pyarrow", "PIL"],
    "plot": ["matplotlib"],
    "ray": ["ray"],
    "postgresql": ["psycopg"],
    "zstd": ["compression" if sys.version_info >= (3, 14) else "backports"],
}
"""What each of Koinon's extras brings, by the names that are imported."""


def in_a_line(error: Exception) -> str:
    """What happened, without a traceback: Koinon's own errors say enough without their class.

    >>> in_a_line(DataError("no file")), in_a_line(KeyError("label"))
    ('no file', "KeyError: 'label'")
    """
    if isinstance(error, KoinonError):
        return str(error)
    if not out_of_memory(error):
        return f"{type(error).__name__}: {error}"
    why = f" ({error})" if str(error) else ""
    return f"out of memory{why}: a smaller model, smaller batches or fewer workers need less"


def out_of_memory(error: Exception) -> bool:
    """NumPy raises MemoryError; PyTorch and others say it in their own words.

    >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("CUDA out of memory")), out_of_memory(KeyError("a"))
    (True, True, False)
    """
    words = ("out of memory", "can't allocate memory", "bad_alloc", "RESOURCE_EXHAUSTED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def nearest(name: str, known: Iterable[str]) -> str:
    """The ending of an error about an unknown name: the nearest known one, or all of them.

    >>> nearest("alhpa", ["alpha", "sites"])
    "did you mean 'alpha'?"
    >>> nearest("x", ["alpha", "sites"])
    'known are alpha, sites'
    >>> nearest("x", [])
    'there are none'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known are {', '.join(names)}" if names else "there are none"


def extra(module: str, name: str) -> ModuleType:
    """Import an optional library, or say which extra of Koinon brings it.

    Raises:
        MissingExtra: the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name and missing.name.split(".")[0] != module.split(".")[0]:
            raise
        library = module.split(".")[0]
        raise MissingExtra(f"this needs {library}: pip install 'koinon[{name}]'") from missing
