"""HOW IT TRAVELS: the local transport hands chunks of sites to workers of this machine or cluster."""

from typing import TYPE_CHECKING

from koinon.lazy import names_of

if TYPE_CHECKING:
    from koinon.transport.local import Chunk, Crew, Local

__all__ = ["Chunk", "Crew", "Local"]

__getattr__ = names_of(__name__, "local")
