"""Counting what one round of a run passes through.

Counted is what has source to read: functions, methods and lambdas of the package, the classes whose methods were
entered, and the modules that all these stand in.  What Python generates (a dataclass's `__init__`) has none.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from house.source import PACKAGE

COMPREHENSIONS = ("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>")
TURN = "Federation.rounds"
"""The generator that a controller's loop resumes once a round: the border between one round and the next."""


@dataclass
class Trace:
    """The classes, functions and modules of Koinon that were entered in one round."""

    classes: set[str] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)

    def note(self, frame: FrameType) -> None:
        """Count one entered frame: methods under the class of their `self`, comprehensions not at all."""
        module, code = frame.f_globals.get("__name__", ""), frame.f_code
        if not code.co_filename.startswith(f"{PACKAGE}{os.sep}") or code.co_name in COMPREHENSIONS:
            return
        name = code.co_qualname
        if code.co_varnames[:1] == ("self",):
            owner = type(frame.f_locals["self"])
            self.classes.add(f"{owner.__module__}.{owner.__qualname__}")
            name = f"{owner.__qualname__}.{code.co_name}"
        self.modules.add(module)
        self.functions.add(f"{module}.{name}")


@contextmanager
def traced(profile: Callable[[FrameType, str, Any], None]) -> Iterator[None]:
    """Call `profile` for every call in this thread and those it starts; what was there before is put back."""
    before = sys.getprofile()
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)
        threading.setprofile(None)  # type: ignore[arg-type]


def trace_of_round(number: int, run: Callable[[], object]) -> Trace:
    """What round `number` of a run passes through, from one turn of its controller's loop to the next."""
    trace, turns = Trace(), 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal turns
        if event != "call":
            return
        turns += frame.f_code.co_qualname == TURN
        if turns == number:
            trace.note(frame)

    with traced(profile):
        run()
    assert turns > number, f"the run ended in turn {turns}: round {number} was not seen to its end"
    return trace
