"""WHAT A RUN SAYS OF ITSELF: one stream of events feeds the live view, the run folder and the report."""

from koinon.tracking.events import FEDERATION, SERVER, Event, Sink, Tracker
from koinon.tracking.folder import Commit, Folder, next_free, state_of
from koinon.tracking.live import live
from koinon.tracking.run import Row, Run, folders, read

__all__ = [
    "FEDERATION",
    "SERVER",
    "Commit",
    "Event",
    "Folder",
    "Row",
    "Run",
    "Sink",
    "Tracker",
    "folders",
    "live",
    "next_free",
    "read",
    "state_of",
]
