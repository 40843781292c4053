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
    return np.random.Generator(np.random.Philox(key=number(seed, purpose, round, site, bits=128)))


def number(seed: int, purpose: str, round: int = 0, site: int | str = 0, bits: int = 63) -> int:
    """One integer of `bits` bits from the same key, for a library that wants a seed."""
    key = repr((int(seed), purpose, int(round), site)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little") >> (128 - bits)
