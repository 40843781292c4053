"""WHAT IS HIDDEN OR SHRUNK on a crossing: one file a filter, both halves in one object."""

from koinon.filters.clip import clip
from koinon.filters.exclude import exclude
from koinon.filters.filter import NOTHING, Filter, chain

__all__ = ["NOTHING", "Filter", "chain", "clip", "exclude"]
