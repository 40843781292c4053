"""HOW IT TRAVELS: the local transport is the call itself."""

from koinon.transport.local import Local

__all__ = ["Local"]
