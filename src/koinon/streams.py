"""Random streams that need no memory: a stream is a function of (seed, purpose, round, site).

Nothing in Koinon draws from a shared generator.  Whoever needs randomness names what it is for, and gets
the same numbers however many workers run, in whatever order, and after a restart.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, purpose: str, round: int = 0, site: int | str = 0) -> np.random.Generator:
    """A Philox generator (counter-based; Salmon et al., 2011) keyed by what it is for.

    >>> bool(stream(7, "batches", 3, "site-1").random() == stream(7, "batches", 3, "site-1").random())
    True
    >>> bool(stream(7, "batches", 3, "site-1").random() == stream(7, "batches", 4, "site-1").random())
    False
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose, round, site)))


def number(seed: int, purpose: str, round: int = 0, site: int | str = 0) -> int:
    """One integer of 63 bits from the same key, for a library that wants a seed."""
    return _key(seed, purpose, round, site) >> 65


def _key(seed: int, purpose: str, round: int, site: int | str) -> int:
    """128 bits from what a stream is for."""
    what = repr((int(seed), purpose, int(round), site))
    return int.from_bytes(hashlib.blake2b(what.encode(), digest_size=16).digest(), "little")
