"""WHAT IS EXCHANGED: named arrays and plain values, arithmetic over them, and their form as bytes."""

from koinon.payload import codec, tree
from koinon.payload.payload import Arrays, Kind, Payload, Plain

__all__ = ["Arrays", "Kind", "Payload", "Plain", "codec", "tree"]
