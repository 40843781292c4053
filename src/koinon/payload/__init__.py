"""WHAT IS EXCHANGED: named arrays and plain values, arithmetic over them, and their form as bytes."""

from typing import TYPE_CHECKING

from koinon.lazy import names_of

if TYPE_CHECKING:
    from koinon.payload import codec, tree
    from koinon.payload.payload import Arrays, Kind, Payload, Plain

__all__ = ["Arrays", "Kind", "Payload", "Plain", "codec", "tree"]

__getattr__ = names_of(__name__, "payload")
