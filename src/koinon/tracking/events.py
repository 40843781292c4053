"""One stream of events feeds everything that a run says of itself: the live view, the run folder, the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

FEDERATION = "federation"
"""The site column of what holds for the federation as a whole."""

SERVER = "server"
"""The site column of what the server measured on data of its own."""

Kind: TypeAlias = Literal["start", "round", "result", "refused", "metric", "commit", "warning", "end", "doing"]
"""
start    the run begins           values: run, rounds, sites, seed, resumed (the round it goes on after)
round    a round begins           values: asked
result   a site answered          values: its train_ metrics, samples, seconds, bytes_up, bytes_down
refused  a site's answer does not count   values: reason, traceback
metric   a model was evaluated    values: metrics such as accuracy and loss, samples
commit   a round is durable       values: the federation's metrics, seconds, bytes_up, bytes_down, answered, asked
warning  somebody should know     values: message
end      the run is over          values: state (finished, failed, stopped), reason
doing    what takes a while after that    values: message
"""


class Event(NamedTuple):
    """Something that happened in a run, `time` seconds after its process began."""

    kind: Kind
    time: float
    round: int = 0
    site: str = FEDERATION
    values: Mapping[str, Any] = MappingProxyType({})


Sink: TypeAlias = Callable[[Event], None]
"""Whoever wants to know.  A sink must not raise: a run does not end because nobody could watch it."""


BOOKKEEPING = {
    *("samples", "train_samples", "seconds", "simulated_seconds"),
    *("bytes_up", "bytes_down", "answered", "asked", "resumed"),
}
"""Numbers about the work, not about the model."""


def is_metric(name: str) -> bool:
    """Whether a number judges the committed model: neither bookkeeping nor a number of the training itself."""
    return name not in BOOKKEEPING and not name.startswith(("train_", "alone_"))


class Tracker:
    """Sends every event to every sink, stamped with the seconds since the run began."""

    def __init__(self, *sinks: Sink, after: float = 0.0) -> None:
        self._sinks = sinks
        self._began = time.perf_counter() - after  # a resumed run's clock goes on where it stood

    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._began

    def emit(self, kind: Kind, round: int = 0, site: str = FEDERATION, values: Mapping[str, Any] | None = None) -> None:
        """Tell every sink."""
        event = Event(kind, self.now(), round, site, values or {})
        for sink in self._sinks:
            sink(event)
